"""A further kind of checkpoint needs one file of its own. Two toys stand for it, served by the engine as it is."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from nv_embed.compute.loading import load_engine, load_engines
from nv_embed.compute.warm_up import warm_up
from nv_embed.errors import CheckpointError, DeviceError
from nv_embed.models.protocol import Network, mean_shares, parameter
from nv_embed.sequence import TokenSequence
from nv_embed.tokenizer import Template, Tokenizer
from safetensors.torch import save_file
from serving import ROOT
from torch.nn import functional

TEXTS = ["a network", "", "one two three, one two three", "a network"]


# --- a bag of token vectors: a network of this project ---------------------------------------------------


class BagNetwork(Network):
    def __init__(self, vocab_size, size):
        super().__init__(vocab_size)
        self.rows = parameter(vocab_size, size)

    def begin(self, batch):
        return (functional.embedding(batch.input_ids, self.rows),)

    def to_vectors(self, x, batch, work):
        num_pooled = len(batch.pooled_indices)
        means = [
            mean_shares(x.index_select(0, batch.pooled_indices[rows]), batch.pooled_seqlens, rows)
            for rows in work.pieces(num_pooled, x.shape[1])
        ]
        return functional.normalize(torch.stack(means).sum(0), dim=-1)

    def places(self):
        yield "bag.weight", self.rows

    @property
    def numbers_per_token(self):
        return self.rows.shape[1]


@dataclass(frozen=True)
class BagCheckpoint:
    vocab_size: int = 1024
    dimension: int = 24
    hidden_size: int = 24
    dtype: str = "float32"
    query_instruction: str = "query: "
    document_instruction: str = "passage: "
    longest_text: int = 512
    pooling: str = "mean"

    def tokenizer(self, folder, max_sequence_tokens):
        template = Template(first="<s>", last="", is_instruction_pooled=True)
        return Tokenizer(
            folder / "tokenizer.json", template, vocab_size=self.vocab_size, max_sequence_tokens=max_sequence_tokens
        )

    def network(self):
        return BagNetwork(self.vocab_size, self.dimension)


@pytest.fixture
def bag(toy, tmp_path) -> tuple[Path, np.ndarray]:
    """A folder, and the token vectors in it."""
    rows = torch.randn(1024, 24, generator=torch.Generator().manual_seed(0))
    save_file({"bag.weight": rows}, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_bytes((toy / "tokenizer.json").read_bytes())
    return tmp_path, rows.numpy()


@pytest.mark.parametrize("dtype", ["float32", "int8"])  # of which a bag has no matrices: nothing is rounded
def test_a_bag_of_token_vectors_is_loaded_and_served(bag, dtype):
    folder, rows = bag
    checkpoint = BagCheckpoint()
    before = torch.get_num_threads()
    try:
        engines = load_engines(
            folder, checkpoint, devices=["cpu", "cpu"], dtype=dtype, compile_layers="on", max_sequence_tokens=512
        )
        sequences = checkpoint.tokenizer(folder, 512).encode(TEXTS, checkpoint.document_instruction)
        with ThreadPoolExecutor(2) as threads:
            results = list(threads.map(lambda engine: engine.embed(sequences), engines))
        assert warm_up(engines[0], sequences[0], 1e-6, 512) == 512
    finally:
        torch.set_num_threads(before)
    expected = np.stack([rows[sequence.input_ids].mean(axis=0) for sequence in sequences])
    for vectors in results:
        np.testing.assert_allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)


def test_weights_of_another_model_are_refused(bag):
    folder, rows = bag
    save_file({"bag.weight": torch.from_numpy(rows[:, :20].copy())}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"misshapen bag\.weight: expected \[1024, 24\], got \[1024, 20\]"):
        load_engines(folder, BagCheckpoint(), devices=["cpu", "cpu"], dtype="float32", max_sequence_tokens=512)


# --- what a library computes: texts in, vectors out ------------------------------------------------------


class Letters:
    """How often each letter comes, by "a library" that knows no packed tokens; a token is a byte."""

    pooling = "mean"
    dimension, hidden_size, longest_text, dtype = 26, 26, None, "float32"
    query_instruction, document_instruction = "", ""
    numbers_per_token = 1
    network, samples = torch.nn.Module(), ()

    def num_parameters(self):
        return 0

    def tokenizer(self, folder, max_sequence_tokens):
        return self

    def encode(self, texts, instruction, *, truncate=True, first_index=0):
        ids = [np.frombuffer((instruction + text).encode() or b"\0", np.uint8).astype(np.int32) for text in texts]
        return [TokenSequence(own, 0) for own in ids]

    def load(self, folder, device, dtype):
        return self

    def embed(self, sequences, work):
        counts = [1 + (own.input_ids[:, None] == np.arange(97, 123)).sum(axis=0) for own in sequences]
        return functional.normalize(torch.tensor(np.stack(counts), dtype=torch.float32), dim=-1)


def test_what_a_library_computes_is_served_by_the_same_engine(tmp_path):
    engine = load_engine(tmp_path, Letters(), device="cpu", dtype="auto")
    sequences = Letters().tokenizer(tmp_path, 99).encode(TEXTS, "x")
    vectors = engine.embed(sequences)
    assert vectors.shape == (4, 26)
    np.testing.assert_array_equal(vectors[0], vectors[3])
    assert sequences[0].digest() == sequences[3].digest() != sequences[1].digest()
    assert warm_up(engine, sequences[2], 1e-6, 512) == 512


@pytest.mark.parametrize(("setting", "value"), [("dtype", "int8"), ("attention", "sdpa"), ("compile_layers", "on")])
def test_what_only_this_project_s_networks_can_do_is_refused_for_a_library(tmp_path, setting, value):
    with pytest.raises(DeviceError, match=f"expected .*another library computes this model; got '{value}'; correct"):
        load_engine(tmp_path, Letters(), device="cpu", **{"dtype": "float32", setting: value})


# --- the rest knows none of them -------------------------------------------------------------------------


def test_what_is_one_models_own_stands_in_one_file():
    """Names, templates, instructions, positions; the scheduler does without torch, too."""
    package = ROOT / "model_repository" / "nv-embed-v2" / "1" / "nv_embed"
    for path in package.rglob("*.py"):
        text = path.read_text("utf-8")
        for file, words in {
            "nv_embed.py": ("latent", "embedding_model", "</s>", "Instruct:"),
            "nemotron.py": ("yarn", "llama_4", "mscale", "Ministral"),
        }.items():
            for own in words if path.name != file else ():
                assert own not in text, f"{own} in {path}"
        if path.name not in ("sentence_transformers.py", "library_model.py"):
            assert not re.search(r"(import|from) (sentence_)?transformers", text), path
        if path.parent.name == "scheduling" or path.name == "sequence.py":
            assert "import torch" not in text
        if path.parent.name in ("compute", "scheduling"):
            assert "models.nv_embed" not in text
            assert "models.mistral" not in text
            assert "models.nemotron" not in text
        if path.parent.name == "models":
            assert "nv_embed.compute" not in text
