"""A batcher whose tokenizer, engine and clients are fakes, and what it said and did."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from nv_embed.errors import DeviceLost, InvalidRequest, OutOfDeviceMemory
from nv_embed.requests import EmbedRequest
from nv_embed.scheduling.answers import Answer
from nv_embed.scheduling.batcher import Batcher
from nv_embed.scheduling.policy import BatchLimits
from nv_embed.tokenizer import TokenSequence
from serving import eventually

WAIT_SECONDS = 60


class FakeEncoder:
    """A text is the decimal number of its tokens; what follows a dot makes it another text of as many."""

    def encode(self, texts, instruction, *, truncate, first_index):
        if "invalid" in texts:
            raise InvalidRequest(f"text {first_index + texts.index('invalid')} is invalid")
        if "boom" in texts:
            raise RuntimeError("the tokenizer broke")
        if "dies" in texts:
            raise SystemExit("a thread dies")
        sequences = []
        for text in texts:
            num_tokens, _, variant = text.partition(".")
            sequences.append(TokenSequence(np.full(int(num_tokens), int(variant or 0), dtype=np.int32), 0))
        return sequences


class Computed(NamedTuple):
    vectors: np.ndarray
    seconds: float


class FakeEngine:
    """The embedding of n tokens is [n, 2n]. Remembers its batches; `gate` holds them back."""

    def __init__(self, capacity=10**9):
        self.batches, self.capacity = [], capacity
        self.started, self.gate = threading.Semaphore(0), threading.Event()
        self.gate.set()

    def compute(self, next_batch, pause):
        sequences = next_batch()
        if not sequences:
            return None
        started = time.monotonic()
        return Computed(self.embed(sequences), time.monotonic() - started)

    def embed(self, sequences):
        lengths = [sequence.num_tokens for sequence in sequences]
        self.batches.append(lengths)
        self.started.release()
        assert self.gate.wait(WAIT_SECONDS)
        if sum(lengths) > self.capacity:
            raise OutOfDeviceMemory("too much")
        if 666 in lengths:
            raise RuntimeError("the device broke")
        if 998 in lengths:
            raise DeviceLost("the device failed")
        if 999 in lengths:
            raise SystemExit("a thread dies")
        rows = np.array([[n, 2 * n] for n in lengths], dtype=np.float32)
        rows[[n == 13 for n in lengths]] = np.nan
        return rows


class FakeReply:
    """Counts its answers; `way` is what becomes of one on the way to the client."""

    def __init__(self, way=lambda outcome: outcome):
        self.cancelled, self.outcomes, self.answered = False, [], threading.Event()
        self.num_questions, self._way = 0, way

    def is_cancelled(self):
        self.num_questions += 1
        return self.cancelled

    def send(self, outcome):
        outcome = self._way(outcome)
        self.outcomes.append(outcome)
        self.answered.set()
        return outcome

    def outcome(self):
        assert self.answered.wait(WAIT_SECONDS)
        (outcome,) = self.outcomes
        return outcome

    def lengths(self):
        outcome = self.outcome()
        assert isinstance(outcome, Answer), outcome
        embeddings = outcome.embeddings()
        assert embeddings[:, 1].tolist() == [2 * n for n in embeddings[:, 0]]
        assert outcome.token_counts == embeddings[:, 0].tolist()
        return outcome.token_counts


class Published:
    """The metrics of a batcher, added up."""

    def __init__(self):
        self.counters, self.observations, self.gauges, self.series = Counter(), {}, {}, set()

    def __call__(self, update):
        metric, labels, value = update
        self.series.add((metric, labels))
        if metric.kind == "counter":
            self.counters[(metric, *dict(labels).values())] += value
        elif metric.kind == "gauge":
            self.gauges[metric] = value
        else:
            self.observations.setdefault(metric, []).append(value)


class FakedBatcher(Batcher):
    """A batcher with small limits; stopped when its block is left, and all its metrics are published then."""

    def __init__(self, *engines, encoder=None, publish=None, **limits):
        defaults = {
            "max_batch_tokens": 100,
            "most_small_batches": 1000,
            "target_batch_seconds": None,
            "max_queue_tokens": 5000,
            "max_queue_bytes": 10**6,
            "max_queue_texts": 10**6,
            "max_queue_seconds": 60.0,
            "query_weight": 8,
            "cache_bytes": 0,
        }
        self.engines = engines or (FakeEngine(),)
        self.engine, self.published, self.fatal = self.engines[0], Published(), threading.Event()
        super().__init__(
            encoder or FakeEncoder(), self.engines, BatchLimits(**defaults | limits),
            on_fatal=self.fatal.set, publish=publish or self.published,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for engine in self.engines:
            if isinstance(engine, FakeEngine):
                engine.gate.set()
        self.stop()

    def ask(self, *texts, is_query=False, timeout_seconds=None, way=lambda outcome: outcome) -> FakeReply:
        """Submit a request."""
        reply, texts = FakeReply(way), tuple(map(str, texts))
        self.submit(EmbedRequest(texts, "", True, is_query, sum(map(len, texts)), timeout_seconds), reply)
        return reply

    def hold(self, num_tokens=1) -> list[FakeReply]:
        """Hold the engines, each inside a batch of its own."""
        for engine in self.engines:
            while engine.started.acquire(blocking=False):
                pass
            engine.gate.clear()
        replies = [self.ask(f"{num_tokens}.{number}") for number in range(len(self.engines))]
        assert all(engine.started.acquire(timeout=WAIT_SECONDS) for engine in self.engines)
        return replies

    @contextmanager
    def held(self, num_tokens=0) -> Iterator[None]:
        """Hold the engine, and let it go on once `num_tokens` wait."""
        (first,) = self.hold()
        yield
        self.wait_for(num_tokens)
        self.engine.gate.set()
        assert first.lengths() == [1]

    def wait_for(self, num_tokens) -> None:
        """Return once so many tokens wait."""
        eventually(lambda: self.num_queue_tokens >= num_tokens, WAIT_SECONDS)


def distinct(num_tokens, num_texts):
    return [f"{num_tokens}.{i}" for i in range(num_texts)]
