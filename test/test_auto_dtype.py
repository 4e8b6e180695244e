"""Whether a CPU computes in bfloat16: by speed and vectors, both measured."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from nv_embed.compute import loading
from nv_embed.compute.auto_dtype import faster
from nv_embed.compute.host import multiplies_bfloat16
from nv_embed.compute.loading import load_engine
from nv_embed.models import read_checkpoint

VECTORS = np.eye(2, 3, dtype=np.float32)


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class TimedEngine:
    """Takes as long as it is told, by a clock of its own."""

    device = torch.device("cpu")

    def __init__(self, clock: Clock, dtype: str, seconds: float, vectors=VECTORS) -> None:
        self._clock, self.dtype, self._seconds, self._vectors = clock, dtype, seconds, vectors

    def embed(self, sequences):
        self._clock.seconds += self._seconds
        return np.resize(self._vectors, (len(sequences), 3))


def chosen(seconds: float, vectors=VECTORS) -> str:
    """Beside a float32 engine that takes a second."""
    clock = Clock()
    exact, rounded = TimedEngine(clock, "float32", 1.0), TimedEngine(clock, "bfloat16", seconds, vectors)
    return faster(exact, rounded, ["one text", "another"], clock).dtype


@pytest.mark.parametrize(
    ("seconds", "dtype"), [(0.4, "bfloat16"), (0.8, "bfloat16"), (0.9, "float32"), (3.0, "float32")]
)
def test_bfloat16_must_be_clearly_faster(seconds, dtype):
    assert chosen(seconds) == dtype


@pytest.mark.parametrize(("turn", "dtype"), [(0.01, "bfloat16"), (0.1, "float32"), (np.nan, "float32")])
def test_bfloat16_must_keep_every_vector(turn, dtype):
    turned = VECTORS.copy()
    turned[1] = [0, np.cos(turn), np.sin(turn)]
    assert chosen(0.1, turned) == dtype


def test_the_log_says_which_and_why(caplog):
    with caplog.at_level(logging.INFO):
        chosen(0.5)
    assert "cpu: dtype bfloat16, because bfloat16 is 2.00 times as fast as float32 (1.2 needed)" in caplog.text
    assert "have a cosine of at least 1.00000 (0.999 needed)" in caplog.text


@pytest.mark.parametrize(
    ("line", "does"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile", True),
        ("flags\t\t: fpu amx_bf16", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("model name\t: of none", False),
    ],
)
def test_a_processor_says_whether_it_multiplies_bfloat16(tmp_path, line, does):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\n{line}\n", encoding="ascii")
    assert multiplies_bfloat16(tmp_path) is does


def test_auto_on_a_cpu_gives_the_vectors_of_float32_whatever_it_chooses(mini):
    checkpoint = read_checkpoint(mini)
    texts = checkpoint.tokenizer(mini, 512).encode(["bread rises", "a longer text about the moon " * 20], "")
    exact = load_engine(mini, checkpoint, device="cpu", dtype="float32")
    auto = load_engine(mini, checkpoint, device="cpu", dtype="auto")
    assert auto.dtype in ("float32", "bfloat16")
    assert (exact.embed(texts) * auto.embed(texts)).sum(axis=1).min() > 0.999
    if not multiplies_bfloat16():
        assert auto.dtype == "float32"


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_log_says_that_a_processor_has_no_bfloat16_if_that_decided(mini, monkeypatch, caplog, dtype):
    monkeypatch.setattr(loading, "multiplies_bfloat16", lambda: False)
    with caplog.at_level(logging.INFO):
        assert load_engine(mini, read_checkpoint(mini), device="cpu", dtype=dtype).dtype == "float32"
    assert (dtype == "auto") == ("cpu: dtype float32, because the processor has no instructions" in caplog.text)


def test_a_server_says_in_which_precision_it_computes(start, mini, tmp_path):
    server = start(tmp_path / "log.txt", mini, {"NV_EMBED_DTYPE": "auto"})
    answer = server.infer(query=["Why does bread rise?"], parameters={"model_info": True}, outputs=None)
    dtype = json.loads(answer["model_info"][0])["dtype"]
    why = "bfloat16 is" if multiplies_bfloat16() else "the processor has no instructions"
    assert f"cpu: dtype {dtype}, because {why}" in server.log_text()
