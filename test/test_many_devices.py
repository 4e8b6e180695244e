"""Several devices behind one queue, proved with `cpu,cpu`: two threads on a real engine, and a real server."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from fakes import WAIT_SECONDS, FakedBatcher
from nv_embed.compute import loading
from nv_embed.compute.loading import load_engine, load_engines
from nv_embed.errors import DeviceLost, Unavailable
from nv_embed.models import read_checkpoint
from nv_embed.scheduling.answers import Answer
from serving import Server

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


class CountingEngine:
    """A real engine that counts its tokens, as slow as is said; it fails for good after some batches if told to."""

    def __init__(self, engine, batches_to_live=10**9, seconds_per_token=0.0):
        self.engine, self.seconds_per_token = engine, seconds_per_token
        self.num_tokens, self.batches_to_live = 0, batches_to_live

    def compute(self, next_batch, pause=lambda: None):
        sequences = next_batch()
        if not sequences:
            return None
        self.batches_to_live -= 1
        if self.batches_to_live < 0:
            raise DeviceLost("the device failed")
        num_tokens = sum(sequence.num_tokens for sequence in sequences)
        self.num_tokens += num_tokens
        time.sleep(num_tokens * self.seconds_per_token)
        return self.engine.compute(lambda: sequences, pause)


@pytest.fixture(scope="module")
def checkpoint(toy):
    config = read_checkpoint(toy)
    return toy, config, config.tokenizer(toy, 512)


def requests(num_requests):
    random = Random(5)
    return [[" ".join(random.choices(WORDS, k=random.randint(1, 60))) for _ in range(20)] for _ in range(num_requests)]


def batching(tokenizer, engines):
    limits = {"max_batch_tokens": 600, "max_queue_tokens": 10**7, "max_queue_bytes": 10**8}
    return FakedBatcher(*engines, encoder=tokenizer, **limits)


@pytest.mark.slow
def test_two_engines_share_the_work_of_one_queue_and_give_the_rows_of_one(checkpoint):
    folder, config, tokenizer = checkpoint
    alone = load_engine(folder, config, device="cpu", dtype="float32")
    # Devices of one speed, so slow that whatever else this machine does counts for little.
    engines = [CountingEngine(alone, seconds_per_token=1e-4) for _ in range(2)]  # threads of a CPU share one engine
    texts = requests(60)
    with batching(tokenizer, engines) as batcher:
        replies = [batcher.ask(*documents) for documents in texts]
        for documents, reply in zip(texts, replies, strict=True):
            expected = alone.embed(tokenizer.encode(documents, "", truncate=True, first_index=0))
            np.testing.assert_allclose(reply.outcome().embeddings(), expected, atol=1e-5)
    shares = [engine.num_tokens / sum(other.num_tokens for other in engines) for engine in engines]
    assert max(shares) <= 1.2 * min(shares), shares


@pytest.mark.parametrize(
    ("devices", "hidden_size", "expected", "num_threads"),
    [
        (["cpu"], 64, ["cpu"] * 4, 1),  # a core for each batch of a narrow network
        (["cpu"], 4096, ["cpu"], 4),  # all cores for a batch of a wide one
        (["cpu", "cpu"], 64, ["cpu"] * 2, 2),  # as many batches as is said
        (["cpu", "cpu"], 4096, ["cpu"] * 2, 2),
        (["cpu", "cuda:0"], 64, ["cpu", "cuda:0", "cuda:0"], 4),  # another device needs cores, too
        (["cuda:0", "cuda:1"], 64, ["cuda:0"] * 2 + ["cuda:1"] * 2, None),  # one batch is computed, one prepared
    ],
)
def test_a_cpus_cores_share_the_work_as_the_network_needs(
    checkpoint, monkeypatch, devices, hidden_size, expected, num_threads
):
    folder, config, _ = checkpoint
    before = torch.get_num_threads()
    loaded = []
    monkeypatch.setattr(loading, "load_engine", lambda *_, device, **__: loaded.append(device) or device)
    monkeypatch.setattr(loading, "most_cores", lambda: 3.5)  # a container's quota
    try:
        torch.set_num_threads(8)
        config = replace(config, hidden_size=hidden_size)
        settings = {"dtype": "float32", "attention": "auto", "compile_layers": "auto", "max_sequence_tokens": 512}
        assert load_engines(folder, config, devices=devices, **settings) == expected
        assert torch.get_num_threads() == (num_threads or 8)
        assert loaded == list(dict.fromkeys(devices))  # weights are in memory once
    finally:
        torch.set_num_threads(before)


def test_when_one_of_two_devices_fails_everyone_is_answered_once_and_the_server_must_restart(checkpoint):
    folder, config, tokenizer = checkpoint
    engine = load_engine(folder, config, device="cpu", dtype="float32")
    engines = [CountingEngine(engine), CountingEngine(engine, batches_to_live=3)]
    with batching(tokenizer, engines) as batcher:
        replies = [batcher.ask(*documents) for documents in requests(60)]
        assert batcher.fatal.wait(WAIT_SECONDS)
        kinds = {type(reply.outcome()) for reply in replies}
        assert kinds <= {Answer, Unavailable}
        assert Unavailable in kinds


def test_a_server_with_two_devices_gives_the_originals_rows(toy, tmp_path):
    server = Server(
        tmp_path / "log.txt", toy, {"DEVICE": "cpu,cpu", "NV_EMBED_CACHE_MEBIBYTES": "0"}
    ).wait_until_ready()
    case = next(c for c in json.loads((toy / "cases.json").read_text("utf-8")) if c["name"] == "documents")
    for _ in range(5):
        rows = server.embed_documents(case["texts"])
        np.testing.assert_allclose(rows, np.load(toy / "expected.npz")["documents"], atol=1e-5)
    assert server.stop() == 0
    assert "cpu: 2 batches at a time" in server.log_text()
