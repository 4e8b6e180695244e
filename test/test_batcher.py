"""The batcher with fakes for tokenizer, engine and client: every request gets exactly one answer, the right one."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import numpy as np
import pytest
from nv_embed.batcher import Answer, Batcher, BatchLimits
from nv_embed.errors import Cancelled, ComputeFailed, InvalidRequest, OutOfDeviceMemory, Unavailable
from nv_embed.requests import EmbedRequest
from nv_embed.tokenizer import TokenSequence

WAIT_SECONDS = 30


class FakeEncoder:
    """A text is the decimal number of its tokens."""

    def encode(self, texts, instruction, *, truncate, first_index):
        if "invalid" in texts:
            raise InvalidRequest(f"text {first_index + texts.index('invalid')} is invalid")
        if "boom" in texts:
            raise RuntimeError("the tokenizer broke")
        return [TokenSequence(np.full(int(text), int(text), dtype=np.int32), 0) for text in texts]


class FakeEngine:
    """The embedding of n tokens is [n, 2n]. Remembers its batches; `gate` holds them back."""

    def __init__(self, capacity=10**9):
        self.batches, self.capacity = [], capacity
        self.started, self.gate = threading.Semaphore(0), threading.Event()
        self.gate.set()

    def __call__(self, sequences):
        lengths = [sequence.num_tokens for sequence in sequences]
        self.batches.append(lengths)
        self.started.release()
        assert self.gate.wait(WAIT_SECONDS)
        if sum(lengths) > self.capacity:
            raise OutOfDeviceMemory("too much")
        if 666 in lengths:
            raise RuntimeError("the device broke")
        if 999 in lengths:
            raise SystemExit("a thread dies")
        rows = np.array([[n, 2 * n] for n in lengths], dtype=np.float32)
        rows[[n == 13 for n in lengths]] = np.nan
        return rows


class FakeReply:
    """Counts its answers."""

    def __init__(self):
        self.cancelled, self.outcomes, self.answered = False, [], threading.Event()

    def is_cancelled(self):
        assert not self.outcomes, "asked after the answer: this would crash Triton"
        return self.cancelled

    def send(self, outcome):
        self.outcomes.append(outcome)
        self.answered.set()

    def outcome(self):
        assert self.answered.wait(WAIT_SECONDS)
        (outcome,) = self.outcomes
        return outcome

    def lengths(self):
        outcome = self.outcome()
        assert isinstance(outcome, Answer), outcome
        assert outcome.embeddings[:, 1].tolist() == [2 * n for n in outcome.embeddings[:, 0]]
        assert outcome.token_counts.tolist() == outcome.embeddings[:, 0].tolist()
        return outcome.token_counts.tolist()


@contextmanager
def running(*engines, max_batch_tokens=100, max_queue_tokens=5000, max_queue_bytes=10**6, on_fatal=lambda: None):
    limits = BatchLimits(max_batch_tokens, max_queue_tokens, max_queue_bytes, query_weight=8)
    batcher = Batcher(FakeEncoder(), engines, limits, on_fatal)
    try:
        yield batcher
    finally:
        for engine in engines:
            engine.gate.set()
        batcher.stop()


def submit(batcher, *texts, is_query=False):
    reply = FakeReply()
    texts = tuple(map(str, texts))
    batcher.submit(EmbedRequest(texts, "", True, is_query, sum(map(len, texts))), reply)
    return reply


def test_rows_come_in_input_order_however_the_request_was_spread_over_batches():
    engine = FakeEngine()
    with running(engine) as batcher:
        lengths = [60, 50, 7, 100, 300, 1, 1, 99]
        assert submit(batcher, *lengths).lengths() == lengths
    assert all(sum(batch) <= 100 or len(batch) == 1 for batch in engine.batches)
    assert len(engine.batches) > 3


@contextmanager
def held(engine, batcher, num_tokens):
    """Holds the engine inside a batch of its own until `num_tokens` more wait."""
    engine.gate.clear()
    first = submit(batcher, 1)
    assert engine.started.acquire(timeout=WAIT_SECONDS)
    yield
    with batcher._changed:
        batcher._changed.wait_for(lambda: batcher._num_queue_tokens >= num_tokens, WAIT_SECONDS)
    engine.gate.set()
    assert first.lengths() == [1]


def test_requests_that_wait_together_are_computed_together():
    engine = FakeEngine()
    with running(engine) as batcher:
        with held(engine, batcher, 60):
            replies = [submit(batcher, n, is_query=True) for n in (10, 20, 30)]
        assert [reply.lengths() for reply in replies] == [[10], [20], [30]]
    assert engine.batches == [[1], [10, 20, 30]]


def test_a_query_passes_a_large_request_that_came_first():
    engine = FakeEngine()
    with running(engine) as batcher:
        with held(engine, batcher, 4020):
            bulk = submit(batcher, *[40] * 100)
            query = submit(batcher, 20, is_query=True)
        assert query.lengths() == [20]
        assert bulk.lengths() == [40] * 100
    assert 20 in engine.batches[1]


def test_an_error_in_one_request_disturbs_no_other():
    engine = FakeEngine()
    with running(engine) as batcher:
        replies = {text: submit(batcher, 5, text, 6) for text in (8, "invalid", 9, "boom", 10, 13, 11)}
        assert [replies[n].lengths() for n in (8, 9, 10, 11)] == [[5, n, 6] for n in (8, 9, 10, 11)]
        assert isinstance(replies["invalid"].outcome(), InvalidRequest)
        assert "text 1 is invalid" in str(replies["invalid"].outcome())
        assert isinstance(replies["boom"].outcome(), ComputeFailed)
        assert "broke" not in str(replies["boom"].outcome())
        assert "text 1" in str(replies[13].outcome())  # not a number
        assert isinstance(replies[13].outcome(), ComputeFailed)


def test_a_failing_batch_fails_its_own_requests_and_no_later_ones():
    engine = FakeEngine()
    with running(engine, max_batch_tokens=1000) as batcher:
        with held(engine, batcher, 671):
            broken, neighbour = submit(batcher, 666), submit(batcher, 5)
        assert isinstance(broken.outcome(), ComputeFailed)
        assert isinstance(neighbour.outcome(), ComputeFailed)
        assert submit(batcher, 7).lengths() == [7]


def test_out_of_memory_halves_the_batch_until_it_fits():
    engine = FakeEngine(capacity=30)
    with running(engine) as batcher:
        with held(engine, batcher, 100):
            replies = [submit(batcher, 10, is_query=True) for _ in range(10)]
        assert [reply.lengths() for reply in replies] == [[10]] * 10


def test_one_text_too_large_for_the_device_gets_an_error_of_its_own():
    engine = FakeEngine(capacity=30)
    with running(engine) as batcher:
        with held(engine, batcher, 60):
            small, large = submit(batcher, 10), submit(batcher, 3, 47)
        assert small.lengths() == [10]
        assert isinstance(large.outcome(), OutOfDeviceMemory)
        assert "text 1" in str(large.outcome())


def test_cancelled_requests_are_dropped_before_they_are_computed():
    engine = FakeEngine()
    with running(engine) as batcher:
        with held(engine, batcher, 220):
            gone, stays = submit(batcher, *[50] * 4), submit(batcher, 20)
            with batcher._changed:  # cancelled while waiting for the device
                batcher._changed.wait_for(lambda: batcher._num_queue_tokens >= 220, WAIT_SECONDS)
            gone.cancelled = True
        assert stays.lengths() == [20]
        assert isinstance(gone.outcome(), Cancelled)
        assert batcher._num_queue_tokens == 0
    assert engine.batches == [[1], [20]]


def test_more_bytes_than_may_wait_are_refused_at_once_and_pass_later():
    engine = FakeEngine()
    with running(engine, max_queue_bytes=4) as batcher:
        with pytest.raises(Unavailable, match=r"at most 4 bytes .* got 0 waiting and 6 more; retry later"):
            submit(batcher, "100", "200")
        assert submit(batcher, 10).lengths() == [10]


def test_more_tokens_than_may_wait_are_answered_unavailable_and_pass_later():
    engine = FakeEngine()
    with running(engine, max_queue_tokens=100) as batcher:
        with held(engine, batcher, 90):
            waits, refused = submit(batcher, 90), submit(batcher, 5, 6)
            assert "at most 100 tokens to wait; got 90 waiting and 11 more; retry later" in str(refused.outcome())
            assert isinstance(refused.outcome(), Unavailable)
        assert waits.lengths() == [90]
        assert submit(batcher, 5, 6).lengths() == [5, 6]


def test_a_request_that_could_never_wait_is_invalid_not_unavailable():
    with running(FakeEngine(), max_queue_tokens=100) as batcher:
        outcome = submit(batcher, 60, 60).outcome()
    assert isinstance(outcome, InvalidRequest)
    assert "at most 100 tokens a request" in str(outcome)


def test_stopping_answers_what_waits_and_refuses_what_comes():
    engine = FakeEngine()
    with running(engine) as batcher:
        engine.gate.clear()
        computing = submit(batcher, 1)
        assert engine.started.acquire(timeout=WAIT_SECONDS)
        waiting = submit(batcher, 90)
        stopper = threading.Thread(target=batcher.stop)
        stopper.start()
        for reply in (computing, waiting):
            assert isinstance(reply.outcome(), Unavailable)
        with pytest.raises(Unavailable, match="stopping"):
            submit(batcher, 5)
        engine.gate.set()
        stopper.join(WAIT_SECONDS)
        assert not stopper.is_alive()


def test_a_dying_thread_leaves_nobody_without_an_answer_and_asks_for_a_restart():
    engine, fatal = FakeEngine(), threading.Event()
    with running(engine, on_fatal=fatal.set) as batcher:
        with held(engine, batcher, 1000):
            fatal_one, waiting = submit(batcher, 999), submit(batcher, 1)
        assert isinstance(fatal_one.outcome(), Unavailable)
        assert isinstance(waiting.outcome(), Unavailable) or waiting.lengths() == [1]
        assert fatal.wait(WAIT_SECONDS)


def test_two_engines_share_one_queue():
    engines = FakeEngine(), FakeEngine()
    for engine in engines:
        engine.gate.clear()
    with running(*engines) as batcher:
        replies = [submit(batcher, 80), submit(batcher, 90)]
        assert all(engine.started.acquire(timeout=WAIT_SECONDS) for engine in engines)
        for engine in engines:
            engine.gate.set()
        assert [reply.lengths() for reply in replies] == [[80], [90]]


def test_a_thousand_concurrent_requests_get_their_own_rows():
    engine = FakeEngine()
    with running(engine, max_queue_tokens=10**6) as batcher:
        replies = {}

        def client(base):
            for i in range(100):
                lengths = [14 + base, 14 + i, 5]
                replies[base, i] = (lengths, submit(batcher, *lengths, is_query=False))

        threads = [threading.Thread(target=client, args=(base,)) for base in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for lengths, reply in replies.values():
            assert reply.lengths() == lengths
    assert len(replies) == 1000
    assert batcher._num_queue_tokens == batcher._num_queue_bytes == 0
    assert not batcher._jobs
