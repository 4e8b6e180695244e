"""Matrices that are arranged for the CPU's own library: the same vectors in less time, or all as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nv_embed.compute import layout
from nv_embed.compute.devices import Cpu
from nv_embed.compute.engine import Engine, PackedModel
from nv_embed.compute.layout import arrange
from nv_embed.compute.loading import load_engine
from nv_embed.models import read_checkpoint
from nv_embed.sequence import TokenSequence
from torch import nn

# oneDNN refuses bfloat16 on other processors, and then matrices stay as they were.
HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
ARRANGED_DTYPES = [torch.float32, torch.bfloat16] if HAS_BFLOAT16 else [torch.float32]
SAMPLES = [TokenSequence(np.arange(n, dtype=np.int32), 0) for n in (3, 20)]


class Timed(nn.Module):
    """Two matrices, one of which is the table of token vectors, too. A pass takes as long as its test says."""

    def __init__(self, dtype, seconds, arranged_seconds, error=None):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 96, dtype=dtype)
        self.hidden = nn.Linear(96, 96, dtype=dtype)
        self.tied = nn.Linear(96, 50, bias=False, dtype=dtype)
        self.tied.weight = self.table.weight
        self.seconds, self.arranged_seconds, self.error = seconds, arranged_seconds, error
        self.now, self.turn, self.vocab_size = 0.0, 1.0, 50

    @property
    def is_arranged(self):
        return self.hidden.weight.is_mkldnn

    def parts_on_tokens(self):
        return []

    def forward(self, batch, work):
        self.now += self.arranged_seconds if self.is_arranged else self.seconds
        if self.is_arranged and self.error:
            raise self.error
        vectors = self.tied(self.hidden(self.table(batch.input_ids)))
        if self.is_arranged:
            vectors = vectors * torch.linspace(self.turn, 1.0, 50, dtype=vectors.dtype)
        means = [part.float().mean(dim=0) for part in vectors.split(batch.seqlens)]
        return nn.functional.normalize(torch.stack(means), dim=-1)


def engine_of(network, dtype=torch.float32) -> Engine:
    return Engine(PackedModel(network, torch.device("cpu")), Cpu(), str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("dtype", ARRANGED_DTYPES)
def test_matrices_that_are_arranged_give_the_same_vectors(dtype, caplog):
    network = Timed(dtype, 2.0, 1.0)
    engine = engine_of(network, dtype)
    before = engine.embed(SAMPLES)
    with caplog.at_level("INFO"):
        arrange(engine, lambda: network.now)
    assert network.is_arranged
    assert not network.tied.weight.is_mkldnn, "the table of token vectors is looked up, too"
    assert (before * engine.embed(SAMPLES)).sum(axis=1).min() > (0.999999 if dtype is torch.float32 else 0.9999)
    assert "matrices arranged for oneDNN: sample texts take 0.50 of the time" in caplog.text


@pytest.mark.parametrize("dtype", ARRANGED_DTYPES)
@pytest.mark.parametrize(
    ("seconds", "error", "reason"),
    [((1.0, 1.1), None, "take 1.10 of the time"), ((2.0, 1.0), KeyError("no such primitive"), "no such primitive")],
    ids=["slower", "fails"],
)
def test_matrices_stay_as_they_were_where_that_is_slower_or_does_not_work(dtype, seconds, error, reason, caplog):
    network = Timed(dtype, *seconds, error)
    engine = engine_of(network, dtype)
    before, weight = engine.embed(SAMPLES), network.hidden.weight.clone()
    with caplog.at_level("INFO"):
        arrange(engine, lambda: network.now)
    assert not network.is_arranged
    assert network.hidden.weight.equal(weight)
    np.testing.assert_array_equal(engine.embed(SAMPLES), before)
    assert "left row by row; arranged for oneDNN: " in caplog.text
    assert reason in caplog.text


def test_matrices_stay_as_they_were_where_only_some_can_be_arranged(monkeypatch):
    more = nn.Linear(96, 96)
    weight, arrange_one, arranged = more.weight.clone(), layout._arrange, []

    def fail_on_the_second(matrix):
        if arranged:
            raise MemoryError("no room")
        arranged.append(matrix)
        arrange_one(matrix)

    monkeypatch.setattr(layout, "_arrange", fail_on_the_second)
    network = Timed(torch.float32, 2.0, 1.0)
    network.more = more
    arrange(engine_of(network), lambda: 0.0)
    assert arranged == [network.hidden]
    assert not network.is_arranged
    assert more.weight.equal(weight)


@pytest.mark.parametrize("turn", [0.5, float("nan")])
def test_matrices_stay_as_they_were_where_vectors_change(turn):
    network = Timed(torch.float32, 2.0, 1.0)
    network.turn = turn
    arrange(engine_of(network), lambda: network.now)
    assert not network.is_arranged


@pytest.mark.skipif(HAS_BFLOAT16, reason="oneDNN takes bfloat16 on this processor")
def test_bfloat16_matrices_stay_as_they_were_where_the_processor_lacks_instructions(caplog):
    network = Timed(torch.bfloat16, 2.0, 1.0)
    with caplog.at_level("INFO"):
        arrange(engine_of(network, torch.bfloat16), lambda: network.now)
    assert not network.is_arranged
    assert "bfloat16 matrices left row by row" in caplog.text


def test_half_precision_and_compiled_layers_are_left_alone():
    half = Timed(torch.float16, 2.0, 1.0)
    arrange(engine_of(half, torch.float16), lambda: half.now)
    assert half.now == 0, "nothing is timed"
    compiled = Timed(torch.float32, 2.0, 1.0)
    engine = engine_of(compiled)
    engine.model.is_compiled = True
    arrange(engine, lambda: compiled.now)
    assert [half.is_arranged, compiled.is_arranged] == [False, False]


def test_a_loaded_model_says_how_its_matrices_lie(toy, caplog):
    with caplog.at_level("INFO"):
        load_engine(toy, read_checkpoint(toy), device="cpu", dtype="float32")
    assert "float32 matrices " in caplog.text
    assert "oneDNN" in caplog.text
