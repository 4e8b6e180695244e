"""The batcher with fakes for tokenizer, engine and client: every request gets exactly one answer, the right one."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
from nv_embed.errors import (
    Cancelled,
    ComputeFailed,
    DeviceLost,
    InvalidRequest,
    OutOfDeviceMemory,
    RequestError,
    Unavailable,
)
from nv_embed.metrics import SERIES, Metric, Recorder
from nv_embed.requests import EmbedRequest
from nv_embed.scheduling.answers import Answer, Outbox
from nv_embed.scheduling.batcher import Batcher
from nv_embed.scheduling.policy import BatchLimits
from nv_embed.tokenizer import TokenSequence

WAIT_SECONDS = 30


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

    def compute(self, next_batch, pause=lambda: None):
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
    """Counts its answers."""

    def __init__(self):
        self.cancelled, self.outcomes, self.answered = False, [], threading.Event()
        self.num_questions = 0

    def is_cancelled(self):
        self.num_questions += 1
        return self.cancelled

    def send(self, outcome):
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


@contextmanager
def running(*engines, encoder=None, on_fatal=lambda: None, publish=lambda update: None, **limits):
    defaults = {
        "max_batch_tokens": 100,
        "target_batch_seconds": None,
        "max_queue_tokens": 5000,
        "max_queue_bytes": 10**6,
        "max_queue_texts": 10**6,
        "max_queue_seconds": 60.0,
        "query_weight": 8,
        "cache_bytes": 0,
    }
    batcher = Batcher(
        encoder or FakeEncoder(), engines, BatchLimits(**defaults | limits), on_fatal=on_fatal, publish=publish
    )
    try:
        yield batcher
    finally:
        for engine in engines:
            engine.gate.set()
        batcher.stop()


def submit(batcher, *texts, is_query=False, timeout_seconds=None):
    reply = FakeReply()
    texts = tuple(map(str, texts))
    batcher.submit(EmbedRequest(texts, "", True, is_query, sum(map(len, texts)), timeout_seconds), reply)
    return reply


def test_rows_come_in_input_order_however_the_request_was_spread_over_batches():
    engine = FakeEngine()
    with running(engine) as batcher:
        lengths = [60, 50, 7, 100, 300, 1, 1, 99]
        assert submit(batcher, *lengths).lengths() == lengths
    assert all(sum(batch) <= 100 or len(batch) == 1 for batch in engine.batches)
    assert len(engine.batches) > 3


def distinct(num_tokens, num_texts):
    return [f"{num_tokens}.{i}" for i in range(num_texts)]


def wait_until(condition):
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextmanager
def held(engine, batcher, num_tokens):
    """Holds the engine inside a batch of its own until `num_tokens` more wait."""
    engine.gate.clear()
    first = submit(batcher, 1)
    assert engine.started.acquire(timeout=WAIT_SECONDS)
    yield
    wait_until(lambda: batcher.num_queue_tokens >= num_tokens)
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
            bulk = submit(batcher, *distinct(40, 100))
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
        assert "expected finite numbers from the network; got others for text 1" in str(replies[13].outcome())
        assert isinstance(replies[13].outcome(), ComputeFailed)


def test_a_failing_batch_fails_its_own_requests_and_no_later_ones():
    engine = FakeEngine()
    with running(engine, max_batch_tokens=1000) as batcher:
        with held(engine, batcher, 671):
            broken, neighbour = submit(batcher, 666), submit(batcher, 5)
        assert isinstance(broken.outcome(), ComputeFailed)
        assert isinstance(neighbour.outcome(), ComputeFailed)
        assert submit(batcher, 7).lengths() == [7]


def test_batches_shrink_while_they_take_longer_than_wanted():
    class SlowEngine(FakeEngine):
        def compute(self, next_batch, pause=lambda: None):
            computed = super().compute(next_batch)
            return computed and Computed(computed.vectors, 0.0002 * computed.vectors[:, 0].sum())  # its own speed

    engine = SlowEngine()
    with running(engine, max_batch_tokens=1000, target_batch_seconds=0.12, max_queue_tokens=10**5) as batcher:
        assert len(submit(batcher, *distinct(10, 1200)).lengths()) == 1200
    first, *_, latest, _ = map(sum, engine.batches)  # the last may be a remainder
    assert first == 1000
    assert 600 <= latest < 900  # towards 600


def test_out_of_memory_halves_the_batch_until_it_fits():
    engine = FakeEngine(capacity=30)
    with running(engine) as batcher:
        with held(engine, batcher, 100):
            replies = [submit(batcher, f"10.{i}", is_query=True) for i in range(10)]
        assert [reply.lengths() for reply in replies] == [[10]] * 10


def test_one_text_too_large_for_the_device_gets_an_error_of_its_own():
    engine = FakeEngine(capacity=30)
    with running(engine) as batcher:
        with held(engine, batcher, 60):
            small, large = submit(batcher, 10), submit(batcher, 3, 47)
        assert small.lengths() == [10]
        assert isinstance(large.outcome(), OutOfDeviceMemory)
        assert "expected texts that fit on the device; got text 1: too much; shorten it" in str(large.outcome())


def test_cancelled_requests_are_dropped_before_they_are_computed():
    engine = FakeEngine()
    with running(engine) as batcher:
        with held(engine, batcher, 20):
            gone, stays = submit(batcher, *distinct(50, 4)), submit(batcher, 20)
            wait_until(lambda: batcher.num_queue_tokens >= 220)
            gone.cancelled = True
            assert isinstance(gone.outcome(), Cancelled)  # answered although the device is busy
        assert stays.lengths() == [20]
        assert batcher.num_queue_tokens == 0
    assert engine.batches == [[1], [20]]


class HeldEncoder(FakeEncoder):
    """Holds back documents, and counts the texts of each slice."""

    def __init__(self):
        self.encoded, self.gate = [], threading.Event()

    def encode(self, texts, instruction, **kwargs):
        if texts[0] != "20":
            self.encoded.append(len(texts))
            assert self.gate.wait(WAIT_SECONDS)
        return super().encode(texts, instruction, **kwargs)


def test_a_query_does_not_wait_for_documents_to_be_tokenized():
    encoder = HeldEncoder()
    with running(FakeEngine(), encoder=encoder) as batcher:
        bulk = submit(batcher, 5)
        wait_until(lambda: encoder.encoded)
        assert submit(batcher, 20, is_query=True).lengths() == [20]
        assert not bulk.answered.is_set()
        encoder.gate.set()
        assert bulk.lengths() == [5]


def large(num_tokens, num_texts):
    """Different texts of which no more than three make a slice."""
    return [f"{text:<30000}" for text in distinct(num_tokens, num_texts)]


def test_large_requests_are_tokenized_slice_by_slice_in_turn_and_keep_their_order():
    encoder = HeldEncoder()
    with running(FakeEngine(), encoder=encoder) as batcher:
        first = submit(batcher, *large(1, 3), *large(2, 3), 3)
        wait_until(lambda: encoder.encoded)
        second, third = submit(batcher, *large(4, 4)), submit(batcher, *large(5, 5), "invalid")
        encoder.gate.set()
        assert first.lengths() == [1, 1, 1, 2, 2, 2, 3]
        assert second.lengths() == [4, 4, 4, 4]
        assert "text 5 is invalid" in str(third.outcome())
    assert encoder.encoded == [3, 3, 3, 3, 1, 3, 1]


def test_a_large_request_for_which_there_is_no_room_is_refused_before_all_of_it_is_tokenized():
    engine, encoder = FakeEngine(), HeldEncoder()
    encoder.gate.set()
    with running(engine, encoder=encoder, max_queue_tokens=100) as batcher:
        with held(engine, batcher, 90):
            waits = submit(batcher, 90)
            wait_until(lambda: batcher.num_queue_tokens == 90)
            refused = submit(batcher, *large(5, 9)).outcome()
        assert isinstance(refused, Unavailable)
        assert "got 90 waiting and 15 more" in str(refused)
        assert waits.lengths() == [90]
    assert encoder.encoded == [1, 1, 3]


def test_bulk_that_fills_the_queue_shuts_out_neither_queries_nor_what_is_known():
    engine = FakeEngine()
    with running(engine, max_queue_tokens=800, cache_bytes=10**6) as batcher:
        assert submit(batcher, 70).lengths() == [70]
        assert engine.started.acquire(timeout=WAIT_SECONDS)
        with held(engine, batcher, 895):
            bulk = submit(batcher, *distinct(80, 10))
            wait_until(lambda: batcher.num_queue_tokens == 800)
            assert isinstance(submit(batcher, 5).outcome(), Unavailable)
            assert submit(batcher, 70).lengths() == [70]  # from the cache
            queries = [submit(batcher, n, is_query=True) for n in (40, 55)]
            wait_until(lambda: batcher.num_queue_tokens == 895)
            assert "at most 900 tokens to wait" in str(submit(batcher, 6, is_query=True).outcome())
        assert [query.lengths() for query in queries] == [[40], [55]]
        assert bulk.lengths() == [80] * 10


def test_a_large_request_whose_vectors_are_known_needs_no_room():
    engine = FakeEngine()
    known = large(20, 10)
    with running(engine, max_queue_tokens=2000, cache_bytes=10**6) as batcher:
        assert submit(batcher, *known).lengths() == [20] * 10
        while engine.started.acquire(blocking=False):
            pass
        with held(engine, batcher, 2000):
            bulk = submit(batcher, *distinct(80, 25))
            wait_until(lambda: batcher.num_queue_tokens == 2000)
            assert submit(batcher, *known).lengths() == [20] * 10
        assert bulk.lengths() == [80] * 25


def test_stopping_waits_for_all_engines_together_not_one_after_the_other():
    engines = [FakeEngine() for _ in range(4)]
    with running(*engines) as batcher:
        for engine in engines:
            engine.gate.clear()
        replies = [submit(batcher, 100 + i) for i in range(len(engines))]
        assert all(engine.started.acquire(timeout=WAIT_SECONDS) for engine in engines)
        started = time.monotonic()
        batcher.stop()
        assert time.monotonic() - started < 6  # 3 s each would be 12
        assert all(isinstance(reply.outcome(), Unavailable) for reply in replies)


def test_more_bytes_than_may_wait_are_refused_at_once_and_pass_later():
    engine = FakeEngine()
    with running(engine, max_queue_bytes=4) as batcher:
        refused = submit(batcher, "100", "200").outcome()
        assert isinstance(refused, Unavailable)
        assert "at most 4 bytes of text to wait; got 0 waiting and 6 more; retry later" in str(refused)
        assert submit(batcher, 10).lengths() == [10]


def test_bytes_that_wait_to_be_tokenized_add_up():
    encoder = HeldEncoder()
    with running(FakeEngine(), encoder=encoder, max_queue_bytes=4) as batcher:
        first = submit(batcher, 100)
        wait_until(lambda: encoder.encoded)
        assert "got 3 waiting and 2 more" in str(submit(batcher, 10).outcome())
        encoder.gate.set()
        assert first.lengths() == [100]
        assert submit(batcher, 10).lengths() == [10]


def test_the_cache_keeps_to_its_limit_and_forgets_the_least_recently_used():
    engine, published = FakeEngine(), Published()
    with running(engine, cache_bytes=700, publish=published) as batcher:  # two vectors of 8 bytes with their keys
        for num_tokens in (10, 20, 10, 30, 10, 20):
            assert submit(batcher, num_tokens).lengths() == [num_tokens]
    assert engine.batches == [[10], [20], [30], [20]]
    assert 0 < published.gauges[Metric.CACHE_BYTES] <= 700


def test_texts_count_until_their_answer_is_sent_although_they_cost_no_computing():
    class SlowReply(FakeReply):
        def send(self, outcome):
            sending.release()
            assert gate.wait(WAIT_SECONDS)
            return super().send(outcome)

    slow, sending, gate = SlowReply(), threading.Semaphore(0), threading.Event()
    with running(FakeEngine(), cache_bytes=10**6, max_queue_texts=16) as batcher:
        assert submit(batcher, 10).lengths() == [10]
        batcher.submit(EmbedRequest(("10",) * 15, "", True, False, 0, None), slow)
        assert sending.acquire(timeout=WAIT_SECONDS)  # settled, and not sent
        refused, query = submit(batcher, 10, 10), submit(batcher, 10, is_query=True)
        gate.set()
        assert slow.lengths() == [10] * 15
        assert "at most 16 texts to wait; got 15 waiting and 2 more; retry later" in str(refused.outcome())
        assert query.lengths() == [10]
        wait_until(lambda: batcher.num_unanswered == 0)
        assert submit(batcher, *["10"] * 16).lengths() == [10] * 16


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
        assert "stopping" in str(submit(batcher, 5).outcome())
        engine.gate.set()
        stopper.join(WAIT_SECONDS)
        assert not stopper.is_alive()


@pytest.mark.parametrize("fatal_text", [998, 999])
def test_a_lost_device_or_dying_thread_leaves_nobody_without_an_answer_and_asks_for_a_restart(fatal_text):
    engine, fatal = FakeEngine(), threading.Event()
    with running(engine, on_fatal=fatal.set) as batcher:
        with held(engine, batcher, fatal_text):
            fatal_one, waiting = submit(batcher, fatal_text), submit(batcher, 1500)
        assert isinstance(fatal_one.outcome(), Unavailable)
        assert isinstance(waiting.outcome(), Unavailable)
        assert fatal.wait(WAIT_SECONDS)
        assert isinstance(submit(batcher, 5).outcome(), Unavailable)


@pytest.mark.parametrize("is_query", [True, False])
def test_a_dying_tokenizer_leaves_nobody_without_an_answer_and_asks_for_a_restart(is_query):
    engine, fatal = FakeEngine(), threading.Event()
    with running(engine, on_fatal=fatal.set) as batcher:
        engine.gate.clear()
        computing = submit(batcher, 90)
        assert engine.started.acquire(timeout=WAIT_SECONDS)
        fatal_one = submit(batcher, "dies", is_query=is_query)
        assert isinstance(fatal_one.outcome(), Unavailable)
        assert isinstance(computing.outcome(), Unavailable)
        assert fatal.wait(WAIT_SECONDS)
        assert not batcher.is_accepting
        assert isinstance(submit(batcher, 5, is_query=not is_query).outcome(), Unavailable)


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


def test_a_long_pass_lets_short_batches_go_first_and_keeps_half_of_the_time():
    class Slow(FakeEngine):
        """A pass of a long text has pieces; each takes a while."""

        def compute(self, next_batch, pause):
            sequences = next_batch()
            if not sequences:
                return None
            lengths = [sequence.num_tokens for sequence in sequences]
            if max(lengths) > 400:
                pieces.append(lengths)
                for _ in range(4):
                    time.sleep(0.3)
                    pause()
            return Computed(self.embed(sequences), 0.1)

    engine, pieces = Slow(), []
    with running(engine) as batcher:
        long = submit(batcher, 1000)
        wait_until(lambda: pieces)
        query, documents, other = submit(batcher, 20, is_query=True), submit(batcher, 30, 99), submit(batcher, 1001)
        assert query.lengths() == [20]
        assert documents.lengths() == [30, 99]
        assert not long.answered.is_set()
        assert long.lengths() == [1000]
        assert other.lengths() == [1001]
    assert pieces == [[1000], [1001]]


def test_a_pass_that_nobody_waits_for_any_more_is_given_up():
    class Endless(FakeEngine):
        def compute(self, next_batch, pause):
            sequences = next_batch()
            while sequences and sequences[0].num_tokens == 1000:
                pause()
            return Computed(self.embed(sequences), 0.1) if sequences else None

    engine, published = Endless(), Published()
    with running(engine, publish=published) as batcher:
        gone, late = submit(batcher, 1000), submit(batcher, 1000, timeout_seconds=1.5)
        gone.cancelled = True
        assert isinstance(gone.outcome(), Cancelled)
        assert isinstance(late.outcome(), Unavailable)
        assert submit(batcher, 5).lengths() == [5]
        endless = submit(batcher, 1000)
    assert isinstance(endless.outcome(), Unavailable)  # and the batcher could stop
    assert engine.batches == [[5]]
    assert published.counters[(Metric.DROPPED_TEXTS,)] >= 1


def test_a_request_that_is_answered_soon_is_never_asked_whether_it_is_cancelled():
    with running(FakeEngine()) as batcher:
        replies = [submit(batcher, n, is_query=True) for n in range(20, 90)]
        assert [reply.lengths() for reply in replies] == [[n] for n in range(20, 90)]
    assert sum(reply.num_questions for reply in replies) <= 10  # a busy machine may take longer for some


class FakeGpu(FakeEngine):
    """Computes in the background: a batch goes on after it was started, and the next one's turn is said by `nearly`."""

    def __init__(self, capacity=10**9):
        super().__init__(capacity)
        self.nearly, self.lock = threading.Semaphore(1), threading.Lock()
        self.chosen, self.begun = [], threading.Semaphore(0)

    def compute(self, next_batch, pause=lambda: None):
        with self.lock:
            self.nearly.acquire()
            sequences = next_batch()
            if not sequences:
                return None
            self.chosen.append([sequence.num_tokens for sequence in sequences])
            if sum(self.chosen[-1]) > self.capacity:
                raise OutOfDeviceMemory("too much")
            self.begun.release()
        return Computed(self.embed(sequences), 0.01)


def test_the_next_batch_is_chosen_and_started_when_the_one_before_is_nearly_computed_and_not_before():
    gpu = FakeGpu()
    gpu.gate.clear()
    with running(gpu, gpu) as batcher:
        bulk = submit(batcher, *distinct(60, 3))
        assert gpu.begun.acquire(timeout=WAIT_SECONDS)
        assert not gpu.begun.acquire(timeout=0.2)  # the device has much left to compute
        query = submit(batcher, 20, is_query=True)  # comes in time to be chosen
        wait_until(lambda: batcher.num_queue_tokens == 140)
        gpu.nearly.release()
        assert gpu.begun.acquire(timeout=WAIT_SECONDS)
        assert not bulk.answered.is_set()  # neither batch is computed
        assert not query.answered.is_set()
        assert gpu.chosen == [[60], [20]]
        gpu.gate.set()
        assert query.lengths() == [20]
        for _ in range(4):
            gpu.nearly.release()
        assert bulk.lengths() == [60, 60, 60]


def test_a_gpu_out_of_memory_computes_the_halves_without_waiting_for_other_work():
    gpu = FakeGpu(capacity=50)
    gpu.nearly = threading.Semaphore(10**6)  # whoever asks for a turn gets it, and keeps it until there is work
    with running(gpu, gpu) as batcher:
        assert submit(batcher, 20, 21, 22, 23).lengths() == [20, 21, 22, 23]
        assert isinstance(submit(batcher, 20, 60).outcome(), OutOfDeviceMemory)
        assert submit(batcher, 24).lengths() == [24]


@pytest.mark.parametrize(("seconds", "order"), [(60.0, [0, 2, 4, 5, 1, 3]), (0.0, [0, 1, 2, 3, 4, 5])])
def test_small_answers_and_errors_pass_large_answers_that_have_not_waited_long(monkeypatch, seconds, order):
    monkeypatch.setattr("nv_embed.scheduling.answers._LARGE_WAITS_SECONDS", seconds)

    def answer(num_rows):
        return Answer(np.zeros((num_rows, 4096), dtype=np.float32), np.zeros(num_rows, dtype=np.int32))

    class SlowReply(FakeReply):
        def send(self, outcome):
            begun.release()
            assert gate.wait(WAIT_SECONDS)
            sent.append(outcome)
            return super().send(outcome)

    sent, begun, gate = [], threading.Semaphore(0), threading.Event()
    outbox = Outbox(Recorder(), collect=list, publish=lambda update: None, on_lost=lambda: None)
    outcomes = [answer(65), answer(66), answer(64), answer(67), Unavailable("full"), answer(1)]
    replies = [SlowReply() for _ in outcomes]
    for reply, outcome in zip(replies, outcomes, strict=True):
        outbox.put(reply, outcome, "documents")
        if outcome is outcomes[0]:
            assert begun.acquire(timeout=WAIT_SECONDS)
    gate.set()
    outbox.close()
    assert [outcomes.index(outcome) for outcome in sent] == order
    assert [reply.outcome() for reply in replies] == outcomes
    assert outbox.num_unsent == 0


def test_an_answer_that_was_sent_is_kept_by_nobody():
    class Sent:
        def send(self, outcome):
            return outcome

    outbox = Outbox(Recorder(), collect=list, publish=lambda update: None, on_lost=lambda: None)
    rows = np.zeros((1, 2), dtype=np.float32)
    outbox.put(Sent(), Answer(rows, np.zeros(1, dtype=np.int32)), "query")
    kept = weakref.ref(rows)
    del rows
    wait_until(lambda: kept() is None)
    outbox.close()


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
    assert batcher.num_queue_tokens == batcher.num_unanswered == 0


# --- nothing computed twice -----------------------------------------------------------------------------


def test_a_text_computed_before_comes_from_the_cache():
    engine, published = FakeEngine(), Published()
    with running(engine, cache_bytes=10**6, publish=published) as batcher:
        assert submit(batcher, 10, 20).lengths() == [10, 20]
        assert submit(batcher, 20, 30, 10).lengths() == [20, 30, 10]
        assert submit(batcher, 20, is_query=True).lengths() == [20]
    assert engine.batches == [[10, 20], [30]]
    assert published.counters[Metric.TEXTS, "cached"] == 3
    assert published.counters[Metric.TEXTS, "computed"] == 3
    assert published.gauges[Metric.CACHE_BYTES] > 0


def test_no_error_is_ever_cached_or_shared_beyond_its_batch():
    engine = FakeEngine()
    with running(engine, cache_bytes=10**6) as batcher:
        assert isinstance(submit(batcher, 13).outcome(), ComputeFailed)
        assert isinstance(submit(batcher, 13).outcome(), ComputeFailed)
        assert isinstance(submit(batcher, 666).outcome(), ComputeFailed)
        assert isinstance(submit(batcher, 666).outcome(), ComputeFailed)
    assert len(engine.batches) == 4


# --- time -----------------------------------------------------------------------------------------------


def test_what_waits_too_long_is_answered_unavailable():
    engine = FakeEngine()
    with running(engine, max_queue_seconds=0.5) as batcher:
        engine.gate.clear()
        first = submit(batcher, 1)
        assert engine.started.acquire(timeout=WAIT_SECONDS)
        late = submit(batcher, 90)
        assert isinstance(late.outcome(), Unavailable)
        assert "within max_queue_milliseconds; got none in" in str(late.outcome())
        assert batcher.num_queue_tokens == 0
        engine.gate.set()
        assert first.lengths() == [1]
    assert engine.batches == [[1]]


@pytest.mark.parametrize("timeout_seconds", [None, 0.5])  # time enough to be started on a busy machine
def test_a_request_in_progress_is_bound_by_its_own_timeout_only(timeout_seconds):
    engine = FakeEngine()
    with running(engine, max_queue_seconds=0.5) as batcher:
        engine.gate.clear()
        started = submit(batcher, 90, 80, timeout_seconds=timeout_seconds)
        assert engine.started.acquire(timeout=WAIT_SECONDS)
        threading.Event().wait(0.6)
        engine.gate.set()
        if timeout_seconds is None:
            assert started.lengths() == [90, 80]
        else:
            assert "within the request's timeout of 500 ms; got none in" in str(started.outcome())


# --- metrics --------------------------------------------------------------------------------------------


def test_metrics_count_requests_texts_tokens_and_batches():
    engine, published = FakeEngine(capacity=50), Published()
    with running(engine, publish=published) as batcher:
        submit(batcher, 10, 20).lengths()
        submit(batcher, 30, is_query=True).lengths()
        submit(batcher, "invalid").outcome()
        submit(batcher, 60).outcome()
        batcher.refuse(FakeReply(), InvalidRequest("neither"))
    assert published.counters[Metric.REQUESTS, "documents", "ok"] == 1
    assert published.counters[Metric.REQUESTS, "query", "ok"] == 1
    assert published.counters[Metric.REQUESTS, "documents", "InvalidRequest"] == 1
    assert published.counters[Metric.REQUESTS, "documents", "OutOfDeviceMemory"] == 1
    assert published.counters[Metric.REQUESTS, "unknown", "InvalidRequest"] == 1
    assert published.counters[(Metric.TOKENS,)] == 60
    assert published.counters[Metric.TEXTS, "computed"] == 3
    assert sum(published.observations[Metric.BATCH_TOKENS]) == 60
    assert sum(published.observations[Metric.BATCH_TEXTS]) == 3
    assert len(published.observations[Metric.QUEUE_SECONDS]) == len(engine.batches)
    assert published.counters[(Metric.OUT_OF_MEMORY,)] == 0
    assert len(published.observations[Metric.COMPUTE_SECONDS]) == 2
    assert published.counters[Metric.REQUEST_SECONDS, "documents"] > 0
    assert published.counters[Metric.REQUEST_SECONDS, "query"] > 0
    assert published.counters[(Metric.TOKENIZE_SECONDS,)] > 0
    assert published.counters[(Metric.ANSWER_SECONDS,)] > 0
    assert published.gauges[Metric.QUEUE_TOKENS] == published.gauges[Metric.QUEUE_BYTES] == 0


def test_metrics_count_halved_batches_and_dropped_texts():
    engine, published = FakeEngine(capacity=50), Published()
    with running(engine, publish=published) as batcher:
        assert submit(batcher, 30, 40).lengths() == [30, 40]
        while engine.started.acquire(blocking=False):
            pass
        with held(engine, batcher, 0):
            gone = submit(batcher, 20)
            gone.cancelled = True
            assert isinstance(gone.outcome(), Cancelled)
    assert published.counters[(Metric.OUT_OF_MEMORY,)] == 1
    assert published.counters[(Metric.DROPPED_TEXTS,)] == 1


def test_metrics_come_while_the_server_runs_and_a_lost_one_loses_no_answer():
    published = Published()

    def publish(update):
        published(update)
        raise RuntimeError("shared memory is full")

    with running(FakeEngine(), publish=publish) as batcher:
        for num_ok in (1, 2):
            assert submit(batcher, 10).lengths() == [10]
            wait_until(lambda: published.counters[Metric.REQUESTS, "documents", "ok"] == num_ok)  # noqa: B023


def test_every_series_that_is_ever_counted_is_known_beforehand():
    engine, published = FakeEngine(capacity=50), Published()
    with running(engine, publish=published, cache_bytes=10**6) as batcher:
        with held(engine, batcher, 40):
            same = [submit(batcher, 20), submit(batcher, 20)]
        assert [reply.lengths() for reply in same] == [[20], [20]]
        assert submit(batcher, 20).lengths() == [20]
        for text in ("invalid", 60, 13):
            submit(batcher, text, is_query=True).outcome()
        batcher.refuse(FakeReply(), InvalidRequest("neither"))
    assert published.series <= set(SERIES)
    sources = {labels for metric, labels in SERIES if metric is Metric.TEXTS}
    assert sources == {labels for metric, labels in published.series if metric is Metric.TEXTS}
    outcomes = {dict(labels)["outcome"] for metric, labels in SERIES if metric is Metric.REQUESTS}
    errors = {error.__name__ for error in RequestError.__subclasses__()}
    assert outcomes == {"ok"} | errors


def test_a_broken_way_back_stops_no_other_answer():
    class DeadlyReply(FakeReply):
        def send(self, outcome):
            raise SystemExit("the thread that answers breaks")

    engine, fatal = FakeEngine(), threading.Event()
    with running(engine, on_fatal=fatal.set) as batcher:
        engine.gate.clear()
        computing = submit(batcher, 90)
        assert engine.started.acquire(timeout=WAIT_SECONDS)
        batcher.refuse(DeadlyReply(), InvalidRequest("neither"))
        assert isinstance(computing.outcome(), Unavailable)
        assert fatal.wait(WAIT_SECONDS)
        engine.gate.set()


def test_an_answer_waits_for_one_metric_at_most():
    published, reply = [], FakeReply()

    def publish(update):
        published.append(reply.answered.is_set())
        if len(published) == 1:
            batcher.refuse(reply, InvalidRequest("neither"))

    with running(FakeEngine(), publish=publish) as batcher:
        submit(batcher, 10).lengths()
        assert isinstance(reply.outcome(), InvalidRequest)
    assert published[:2] == [False, True]


def test_an_answer_that_its_way_back_refuses_is_counted_as_what_the_client_got():
    class NarrowReply(FakeReply):
        def send(self, outcome):
            return super().send(InvalidRequest("too large to send"))

    published, reply = Published(), NarrowReply()
    with running(FakeEngine(), publish=published) as batcher:
        batcher.submit(EmbedRequest(("10",), "", True, False, 2, None), reply)
        assert isinstance(reply.outcome(), InvalidRequest)
    assert published.counters[Metric.REQUESTS, "documents", "InvalidRequest"] == 1
    assert published.counters[Metric.REQUESTS, "documents", "ok"] == 0


def test_an_answer_that_is_lost_is_not_counted_as_given():
    class BrokenReply(FakeReply):
        def send(self, outcome):
            super().send(outcome)
            raise RuntimeError("no way to the client")

    published, fatal = Published(), threading.Event()
    with running(FakeEngine(), publish=published, on_fatal=fatal.set) as batcher:
        batcher.submit(EmbedRequest(("10",), "", True, False, 2, None), BrokenReply())
        assert fatal.wait(WAIT_SECONDS)
    assert all(metric is not Metric.REQUESTS for metric, *_ in published.counters)


# --- what must stay small -------------------------------------------------------------------------------


def test_identical_queries_do_not_use_up_the_share_of_others():
    engine = FakeEngine()
    with running(engine, max_queue_tokens=10**6) as batcher:
        with held(engine, batcher, 40 * 200 + 30 * 500 + 35):
            bulk = submit(batcher, *distinct(40, 200))
            same = [submit(batcher, 30, is_query=True) for _ in range(500)]
            other = submit(batcher, 35, is_query=True)
        assert other.lengths() == [35]
        assert [reply.lengths() for reply in same] == [[30]] * 500
        assert bulk.lengths() == [40] * 200
    assert 35 in engine.batches[1]


def test_the_tensors_of_a_batch_that_did_not_fit_are_gone_when_its_halves_are_computed():
    class Activations:
        pass

    alive = []

    class Greedy(FakeEngine):
        def embed(self, sequences):
            return embed(sequences)

    def embed(sequences):
        activations = Activations()
        alive.append(weakref.ref(activations))
        assert sum(reference() is not None for reference in alive) == 1
        if len(sequences) > 1:
            try:
                raise MemoryError
            except MemoryError:
                raise OutOfDeviceMemory("too much") from None
        return np.array([[1.0, 2.0]], dtype=np.float32)

    with running(Greedy()) as batcher:
        assert isinstance(submit(batcher, *distinct(10, 8)).outcome(), Answer)
    assert len(alive) == 15


def test_a_request_is_answered_when_its_time_is_over_not_when_the_batch_before_it_is():
    engine = FakeEngine()
    with running(engine) as batcher:
        engine.gate.clear()
        slow = submit(batcher, 1)
        assert engine.started.acquire(timeout=WAIT_SECONDS)
        assert isinstance(submit(batcher, 2, timeout_seconds=0.05).outcome(), Unavailable)
        assert not slow.answered.is_set()
        engine.gate.set()
        assert slow.lengths() == [1]


def test_draining_says_how_much_is_unanswered_and_refuses_what_takes_too_long():
    engine = FakeEngine()
    engine.gate.clear()
    with running(engine) as batcher:
        computing = submit(batcher, 90)
        assert engine.started.acquire(timeout=WAIT_SECONDS)
        waiting = submit(batcher, 80)
        assert batcher.is_accepting
        assert batcher.num_unanswered == 2
        batcher.drain(0.05)
        assert not batcher.is_accepting
        outcome = waiting.outcome()  # answered although the device is busy
        assert isinstance(outcome, Unavailable)
        assert "the time the server has to stop" in str(outcome)
        assert isinstance(computing.outcome(), Unavailable)
        late = submit(batcher, 70)  # Triton had taken it before
        assert "the time the server has to stop" in str(late.outcome())
