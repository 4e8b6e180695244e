"""The network against the original's outputs and against the naive reference."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from nv_embed.compute.engine import Engine
from nv_embed.compute.loading import load_engine
from nv_embed.models import read_checkpoint
from nv_embed.sequence import TokenSequence
from reference import Reference, Sizes

TOLERANCE = 1e-5


def load(folder: Path) -> Engine:
    return load_engine(folder, read_checkpoint(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def engine(toy: Path) -> Engine:
    return load(toy)


@pytest.fixture(scope="module")
def golden(toy: Path) -> list[tuple[dict, list[TokenSequence], np.ndarray]]:
    """Each case of the fixture, our token sequences for it, and the original's embeddings."""
    expected = np.load(toy / "expected.npz")
    config = read_checkpoint(toy)
    cases = []
    for case in json.loads((toy / "cases.json").read_text(encoding="utf-8")):
        tokenizer = config.tokenizer(toy, case["max_length"])
        cases.append((case, tokenizer.encode(case["texts"], case["instruction"]), expected[case["name"]]))
    return cases


def test_token_ids_and_masked_counts_are_the_originals(golden):
    for case, sequences, _ in golden:
        assert [sequence.input_ids.tolist() for sequence in sequences] == case["input_ids"], case["name"]
        assert {sequence.num_masked for sequence in sequences} == {case["num_masked"]}, case["name"]


def test_each_text_alone_gets_the_originals_embedding(engine, golden):
    for case, sequences, expected in golden:
        for sequence, row in zip(sequences, expected, strict=True):
            np.testing.assert_allclose(engine.embed([sequence])[0], row, atol=TOLERANCE, err_msg=case["name"])


@pytest.mark.parametrize("seed", range(3))
def test_all_texts_packed_in_any_order_get_the_originals_embeddings(engine, golden, seed):
    pairs = [pair for _, sequences, expected in golden for pair in zip(sequences, expected, strict=True)]
    Random(seed).shuffle(pairs)
    sequences, expected = zip(*pairs, strict=True)
    np.testing.assert_allclose(engine.embed(sequences), np.stack(expected), atol=TOLERANCE)


def test_a_text_is_the_same_alone_and_between_neighbours(engine, golden):
    a, b = golden[0][1][0], golden[1][1][-1]
    packed, alone = engine.embed([a, b, a]), engine.embed([a])
    np.testing.assert_allclose(packed[0], alone[0], atol=TOLERANCE)
    np.testing.assert_allclose(packed[2], alone[0], atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_the_naive_padded_reference_on_random_sizes(tmp_path, seed):
    random = Random(seed)
    sizes = Sizes.draw(random)
    reference = Reference(sizes, seed)
    reference.save(tmp_path)
    lengths = [random.randint(1, 90) for _ in range(random.randint(1, 8))]
    sequences = [[random.randrange(sizes.vocab_size) for _ in range(length)] for length in lengths]
    num_masked = [random.randrange(length) for length in lengths]
    ours = load(tmp_path).embed(
        [TokenSequence(np.array(ids, dtype=np.int32), k) for ids, k in zip(sequences, num_masked, strict=True)]
    )
    np.testing.assert_allclose(ours, reference.embed(sequences, num_masked), atol=TOLERANCE, err_msg=str(sizes))
