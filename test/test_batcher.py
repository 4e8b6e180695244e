"""The batcher with fakes for tokenizer, engine and client: every request gets exactly one answer, the right one.

What becomes of a request in any order of events is in test_ledger.py, without threads.
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import ClassVar

import numpy as np
import pytest
from fakes import WAIT_SECONDS, Computed, FakedBatcher, FakeEncoder, FakeEngine, distinct
from nv_embed.errors import Cancelled, ComputeFailed, InvalidRequest, OutOfDeviceMemory, Unavailable
from nv_embed.metrics import Metric
from nv_embed.scheduling.answers import Answer
from serving import eventually


def test_rows_come_in_input_order_however_the_request_was_spread_over_batches():
    with FakedBatcher() as batcher:
        lengths = [60, 50, 7, 100, 300, 1, 1, 99]
        assert batcher.ask(*lengths).lengths() == lengths
    batches = batcher.engine.batches
    assert all(sum(batch) <= 100 or len(batch) == 1 for batch in batches)
    assert len(batches) > 3


def test_requests_that_wait_together_are_computed_together():
    with FakedBatcher() as batcher:
        with batcher.held(60):
            replies = [batcher.ask(n, is_query=True) for n in (10, 20, 30)]
        assert [reply.lengths() for reply in replies] == [[10], [20], [30]]
    assert batcher.engine.batches == [[1], [10, 20, 30]]


def test_a_query_passes_a_large_request_that_came_first():
    with FakedBatcher() as batcher:
        with batcher.held(4020):
            bulk, query = batcher.ask(*distinct(40, 100)), batcher.ask(20, is_query=True)
        assert query.lengths() == [20]
        assert bulk.lengths() == [40] * 100
    assert 20 in batcher.engine.batches[1]


def test_a_thousand_concurrent_requests_get_their_own_rows():
    with FakedBatcher(max_queue_tokens=10**6) as batcher:
        replies = {}

        def client(base):
            for i in range(100):
                lengths = [14 + base, 14 + i, 5]
                replies[base, i] = (lengths, batcher.ask(*lengths))

        threads = [threading.Thread(target=client, args=(base,)) for base in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for lengths, reply in replies.values():
            assert reply.lengths() == lengths
    assert len(replies) == 1000
    assert batcher.num_queue_tokens == batcher.num_unanswered == 0


# --- what fails -----------------------------------------------------------------------------------------


def test_an_error_in_one_request_disturbs_no_other():
    with FakedBatcher() as batcher:
        replies = {text: batcher.ask(5, text, 6) for text in (8, "invalid", 9, "boom", 10, 13, 11)}
        assert [replies[n].lengths() for n in (8, 9, 10, 11)] == [[5, n, 6] for n in (8, 9, 10, 11)]
        assert isinstance(replies["invalid"].outcome(), InvalidRequest)
        assert "text 1 is invalid" in str(replies["invalid"].outcome())
        assert isinstance(replies["boom"].outcome(), ComputeFailed)
        assert "broke" not in str(replies["boom"].outcome())
        assert "expected finite numbers from the network; got others for text 1" in str(replies[13].outcome())
        assert isinstance(replies[13].outcome(), ComputeFailed)


def test_a_failing_batch_fails_its_own_requests_and_no_later_ones():
    with FakedBatcher(max_batch_tokens=1000) as batcher:
        with batcher.held(671):
            broken, neighbour = batcher.ask(666), batcher.ask(5)
        assert isinstance(broken.outcome(), ComputeFailed)
        assert isinstance(neighbour.outcome(), ComputeFailed)
        assert batcher.ask(7).lengths() == [7]


def test_a_batch_too_large_for_the_device_is_halved_and_one_text_too_large_gets_an_error_of_its_own():
    with FakedBatcher(FakeEngine(capacity=30)) as batcher:
        with batcher.held(60):
            small, large = batcher.ask(10), batcher.ask(3, 47)
        assert small.lengths() == [10]
        assert isinstance(large.outcome(), OutOfDeviceMemory)
        assert "expected texts that fit on the device; got text 1: too much; shorten it" in str(large.outcome())
    assert sorted(batcher.engine.batches[1]) == [3, 10, 47]


def test_the_tensors_of_a_batch_that_did_not_fit_are_gone_when_its_halves_are_computed():
    class Activations:
        pass

    alive = []

    class Greedy(FakeEngine):
        def embed(self, sequences):
            activations = Activations()
            alive.append(weakref.ref(activations))
            assert sum(reference() is not None for reference in alive) == 1
            if len(sequences) > 1:
                try:
                    raise MemoryError
                except MemoryError:
                    raise OutOfDeviceMemory("too much") from None
            return np.array([[1.0, 2.0]], dtype=np.float32)

    with FakedBatcher(Greedy()) as batcher:
        assert isinstance(batcher.ask(*distinct(10, 8)).outcome(), Answer)
    assert len(alive) == 15


@pytest.mark.parametrize(("fatal_text", "is_query"), [(998, False), (999, False), ("dies", False), ("dies", True)])
def test_a_lost_device_or_a_dying_thread_leaves_nobody_without_an_answer_and_asks_for_a_restart(fatal_text, is_query):
    with FakedBatcher() as batcher:
        batcher.hold()
        fatal_one, waiting = batcher.ask(fatal_text, is_query=is_query), batcher.ask(1500)
        if fatal_text != "dies":  # of a tokenizer, while the device is busy
            batcher.engine.gate.set()
        assert isinstance(fatal_one.outcome(), Unavailable)
        assert isinstance(waiting.outcome(), Unavailable)
        assert batcher.fatal.wait(WAIT_SECONDS)
        assert not batcher.is_accepting
        assert isinstance(batcher.ask(5, is_query=not is_query).outcome(), Unavailable)


def test_an_engine_that_breaks_before_it_has_a_batch_ends_its_thread_instead_of_trying_for_ever():
    class Broken(FakeEngine):
        def compute(self, next_batch, pause):
            assert self.started.acquire(timeout=WAIT_SECONDS)
            raise RuntimeError("no turn")

    with FakedBatcher(Broken()) as batcher:
        waiting = batcher.ask(90)
        batcher.engine.started.release(2)
        assert isinstance(waiting.outcome(), Unavailable)
        assert batcher.fatal.wait(WAIT_SECONDS)


# --- tokenizing -----------------------------------------------------------------------------------------


class HeldEncoder(FakeEncoder):
    """Holds back documents, and counts the texts of each slice."""

    def __init__(self):
        self.encoded, self.gate = [], threading.Event()

    def encode(self, texts, instruction, **kwargs):
        if texts[0] != "20":
            self.encoded.append(len(texts))
            assert self.gate.wait(WAIT_SECONDS)
        return super().encode(texts, instruction, **kwargs)


def large(num_tokens, num_texts):
    """Different texts of which no more than three make a slice."""
    return [f"{text:<30000}" for text in distinct(num_tokens, num_texts)]


def test_a_request_of_many_texts_is_not_short_however_little_they_are():
    encoder = HeldEncoder()
    with FakedBatcher(encoder=encoder) as batcher:
        many = batcher.ask(*distinct(1, 17))  # returns although the encoder is held
        assert batcher.ask(20, is_query=True).lengths() == [20]
        encoder.gate.set()
        assert many.lengths() == [1] * 17


def test_what_is_left_for_a_larger_batch_is_computed_when_the_small_one_before_is_done():
    engines = FakeEngine(), FakeEngine()
    with FakedBatcher(*engines, most_small_batches=1) as batcher:
        for engine in engines:
            engine.gate.clear()
        first = batcher.ask(10, is_query=True)
        eventually(lambda: engines[0].batches or engines[1].batches, WAIT_SECONDS)
        left = [batcher.ask(n, is_query=True) for n in (20, 30)]
        batcher.wait_for(50)
        time.sleep(0.1)  # in which an engine that did not leave them would begin
        assert sum(len(engine.batches) for engine in engines) == 1
        for engine in engines:
            engine.gate.set()
        assert [reply.lengths() for reply in (first, *left)] == [[10], [20], [30]]
        assert sorted(batch for engine in engines for batch in engine.batches) == [[10], [20, 30]]


def long(num_tokens):
    """A text that is too long to be tokenized by the thread that takes it."""
    return f"{num_tokens:<5000}"


def test_what_is_short_is_tokenized_by_the_thread_that_takes_it():
    class WhoEncodes(FakeEncoder):
        threads: ClassVar = []

        def encode(self, texts, *arguments, **options):
            self.threads.append(threading.current_thread().name)
            return super().encode(texts, *arguments, **options)

    with FakedBatcher(encoder=WhoEncodes()) as batcher:
        for text, is_query in ((5, False), (6, True), (long(7), False), (long(8), True)):
            batcher.ask(text, is_query=is_query).lengths()
    mine = threading.current_thread().name
    assert WhoEncodes.threads == [mine, mine, "nv-embed-tokenize-documents", "nv-embed-tokenize-queries"]


def test_a_query_does_not_wait_for_documents_to_be_tokenized():
    encoder = HeldEncoder()
    with FakedBatcher(encoder=encoder) as batcher:
        bulk = batcher.ask(long(5))
        eventually(lambda: encoder.encoded, WAIT_SECONDS)
        assert batcher.ask(20, is_query=True).lengths() == [20]
        assert not bulk.answered.is_set()
        encoder.gate.set()
        assert bulk.lengths() == [5]


def test_large_requests_are_tokenized_slice_by_slice_in_turn_and_keep_their_order():
    encoder = HeldEncoder()
    with FakedBatcher(encoder=encoder) as batcher:
        first = batcher.ask(*large(1, 3), *large(2, 3), 3)
        eventually(lambda: encoder.encoded, WAIT_SECONDS)
        second, third = batcher.ask(*large(4, 4)), batcher.ask(*large(5, 5), "invalid")
        encoder.gate.set()
        assert first.lengths() == [1, 1, 1, 2, 2, 2, 3]
        assert second.lengths() == [4, 4, 4, 4]
        assert "text 5 is invalid" in str(third.outcome())
    assert encoder.encoded == [3, 3, 3, 3, 1, 3, 1]


# --- how much may wait ----------------------------------------------------------------------------------


def test_more_tokens_than_may_wait_are_refused_before_all_are_tokenized_and_pass_later():
    encoder = HeldEncoder()
    encoder.gate.set()
    with FakedBatcher(encoder=encoder, max_queue_tokens=100) as batcher:
        with batcher.held():
            waits = batcher.ask(90)
            batcher.wait_for(90)
            refused = batcher.ask(*large(5, 9)).outcome()
        assert isinstance(refused, Unavailable)
        assert "at most 100 tokens to wait; got 90 waiting and 15 more; retry later" in str(refused)
        assert encoder.encoded == [1, 1, 3]
        assert waits.lengths() == [90]
        assert batcher.ask(*large(5, 9)).lengths() == [5] * 9
        never = batcher.ask(60, 60).outcome()
        assert isinstance(never, InvalidRequest)
        assert "at most 100 tokens a request" in str(never)


def test_bulk_that_fills_the_queue_shuts_out_neither_queries_nor_what_is_known():
    known = large(7, 10)
    with FakedBatcher(max_queue_tokens=800, cache_bytes=10**6) as batcher:
        assert batcher.ask(*known).lengths() == [7] * 10
        with batcher.held():
            bulk = batcher.ask(*distinct(80, 10))
            batcher.wait_for(800)
            assert isinstance(batcher.ask(5).outcome(), Unavailable)
            assert batcher.ask(*known).lengths() == [7] * 10  # from the cache
            queries = [batcher.ask(n, is_query=True) for n in (40, 55)]
            batcher.wait_for(895)
            assert "at most 900 tokens to wait" in str(batcher.ask(6, is_query=True).outcome())
        assert [query.lengths() for query in queries] == [[40], [55]]
        assert bulk.lengths() == [80] * 10


def test_bytes_that_wait_to_be_tokenized_add_up_to_what_may_wait():
    encoder = HeldEncoder()
    with FakedBatcher(encoder=encoder, max_queue_bytes=9000) as batcher:
        first = batcher.ask(long(100))
        eventually(lambda: encoder.encoded, WAIT_SECONDS)
        refused = batcher.ask(long(10)).outcome()
        assert isinstance(refused, Unavailable)
        assert "at most 9000 bytes of text to wait; got 5000 waiting and 5000 more; retry later" in str(refused)
        encoder.gate.set()
        assert first.lengths() == [100]
        assert batcher.ask(long(10)).lengths() == [10]


# --- nothing computed twice -----------------------------------------------------------------------------


def test_a_text_computed_before_comes_from_the_cache():
    with FakedBatcher(cache_bytes=10**6) as batcher:
        assert batcher.ask(10, 20).lengths() == [10, 20]
        assert batcher.ask(20, 30, 10).lengths() == [20, 30, 10]
        assert batcher.ask(20, is_query=True).lengths() == [20]
    assert batcher.engine.batches == [[10, 20], [30]]
    assert batcher.published.counters[Metric.TEXTS, "cached"] == 3
    assert batcher.published.counters[Metric.TEXTS, "computed"] == 3


def test_the_cache_keeps_to_its_limit_and_forgets_the_least_recently_used():
    with FakedBatcher(cache_bytes=700) as batcher:  # two vectors of 8 bytes with their keys
        for num_tokens in (10, 20, 10, 30, 10, 20):
            assert batcher.ask(num_tokens).lengths() == [num_tokens]
    assert batcher.engine.batches == [[10], [20], [30], [20]]
    assert 0 < batcher.published.gauges[Metric.CACHE_BYTES] <= 700


# --- passes ---------------------------------------------------------------------------------------------


def test_batches_shrink_while_they_take_longer_than_wanted():
    class SlowEngine(FakeEngine):
        def compute(self, next_batch, pause):
            computed = super().compute(next_batch, pause)
            return computed and Computed(computed.vectors, 0.0002 * computed.vectors[:, 0].sum())  # its own speed

    with FakedBatcher(
        SlowEngine(), max_batch_tokens=1000, target_batch_seconds=0.12, max_queue_tokens=10**5
    ) as batcher:
        assert len(batcher.ask(*distinct(10, 1200)).lengths()) == 1200
    first, *_, latest, _ = map(sum, batcher.engine.batches)  # the last may be a remainder
    assert first == 1000
    assert 600 <= latest < 900  # towards 600


def test_a_long_pass_lets_short_batches_go_first_and_no_other_long_one():
    class Slow(FakeEngine):
        """A pass of a long text has pieces; the first takes long, and lasts until others wait."""

        def compute(self, next_batch, pause):
            sequences = next_batch()
            if not sequences:
                return None
            if sequences[0].num_tokens > 400:
                passes.append([sequence.num_tokens for sequence in sequences])
                assert others_wait.wait(WAIT_SECONDS)
                time.sleep(0.6)  # shorter ones are not interrupted
                for _ in range(4):
                    pause()
            return Computed(self.embed(sequences), 0.1)

    passes, others_wait = [], threading.Event()
    with FakedBatcher(Slow()) as batcher:
        long = batcher.ask(1000)
        eventually(lambda: passes, WAIT_SECONDS)
        query, documents, other = batcher.ask(20, is_query=True), batcher.ask(30, 99), batcher.ask(1001)
        batcher.wait_for(20 + 30 + 99 + 1001)
        others_wait.set()
        assert [reply.lengths() for reply in (query, documents, long, other)] == [[20], [30, 99], [1000], [1001]]
    assert passes == [[1000], [1001]]
    batches = batcher.engine.batches
    assert max(map(batches.index, ([20], [30], [99]))) < batches.index([1000])


def test_a_pass_that_nobody_waits_for_any_more_is_given_up():
    class Endless(FakeEngine):
        def compute(self, next_batch, pause):
            sequences = next_batch()
            while sequences and sequences[0].num_tokens == 1000:
                pause()
            return Computed(self.embed(sequences), 0.1) if sequences else None

    with FakedBatcher(Endless()) as batcher:
        gone, late = batcher.ask(1000), batcher.ask(1000, timeout_seconds=1.5)
        gone.cancelled = True
        assert isinstance(gone.outcome(), Cancelled)
        assert isinstance(late.outcome(), Unavailable)
        assert batcher.ask(5).lengths() == [5]
        endless = batcher.ask(1000)
    assert isinstance(endless.outcome(), Unavailable)  # and the batcher could stop
    assert batcher.engine.batches == [[5]]
    assert batcher.published.counters[(Metric.DROPPED_TEXTS,)] >= 1


class FakeGpu(FakeEngine):
    """Computes in the background: a batch goes on after it was started, and the next one's turn is said by `nearly`."""

    def __init__(self, capacity=10**9):
        super().__init__(capacity)
        self.nearly, self.lock = threading.Semaphore(1), threading.Lock()
        self.chosen, self.begun = [], threading.Semaphore(0)

    def compute(self, next_batch, pause):
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
    with FakedBatcher(gpu, gpu) as batcher:
        bulk = batcher.ask(*distinct(60, 3))
        assert gpu.begun.acquire(timeout=WAIT_SECONDS)
        assert not gpu.begun.acquire(timeout=0.2)  # the device has much left to compute
        query = batcher.ask(20, is_query=True)  # comes in time to be chosen
        batcher.wait_for(140)
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
    with FakedBatcher(gpu, gpu) as batcher:
        assert batcher.ask(20, 21, 22, 23).lengths() == [20, 21, 22, 23]
        assert isinstance(batcher.ask(20, 60).outcome(), OutOfDeviceMemory)
        assert batcher.ask(24).lengths() == [24]


# --- the end of waiting ---------------------------------------------------------------------------------


def test_cancelled_requests_are_dropped_before_they_are_computed():
    with FakedBatcher() as batcher:
        with batcher.held(20):
            gone, stays = batcher.ask(*distinct(50, 4)), batcher.ask(20)
            batcher.wait_for(220)
            gone.cancelled = True
            assert isinstance(gone.outcome(), Cancelled)  # answered although the device is busy
        assert stays.lengths() == [20]
        assert batcher.num_queue_tokens == 0
    assert batcher.engine.batches == [[1], [20]]


def test_a_request_that_is_answered_soon_is_never_asked_whether_it_is_cancelled():
    with FakedBatcher() as batcher:
        replies = [batcher.ask(n, is_query=True) for n in range(20, 90)]
        assert [reply.lengths() for reply in replies] == [[n] for n in range(20, 90)]
    assert sum(reply.num_questions for reply in replies) <= 10  # a busy machine may take longer for some


def test_what_waits_for_too_long_is_answered_although_the_device_is_busy_and_what_is_begun_goes_on():
    with FakedBatcher(max_queue_seconds=0.5) as batcher, batcher.held():
        impatient, late = batcher.ask(2, timeout_seconds=0.05).outcome(), batcher.ask(90).outcome()
        assert isinstance(impatient, Unavailable)
        assert "within the request's timeout of 50 ms; got none in" in str(impatient)
        assert isinstance(late, Unavailable)
        assert "within max_queue_milliseconds; got none in" in str(late)
        assert batcher.num_queue_tokens == 0
    assert batcher.engine.batches == [[1]]


def test_stopping_answers_everybody_refuses_what_comes_and_waits_for_all_engines_together():
    with FakedBatcher(*(FakeEngine() for _ in range(4))) as batcher:
        computing, waiting = batcher.hold(100), batcher.ask(90)
        stopper = threading.Thread(target=batcher.stop)
        stopper.start()
        assert all(isinstance(reply.outcome(), Unavailable) for reply in (*computing, waiting))
        assert "stopping" in str(batcher.ask(5).outcome())
        stopper.join(11)  # of one engine after the other it would wait 12 s
        assert not stopper.is_alive()


def test_draining_says_how_much_is_unanswered_and_refuses_what_takes_too_long():
    with FakedBatcher() as batcher:
        (computing,), waiting = batcher.hold(), batcher.ask(80)
        assert batcher.is_accepting
        assert batcher.num_unanswered == 2
        batcher.drain(0.05)
        assert not batcher.is_accepting
        outcome = waiting.outcome()  # answered although the device is busy
        assert isinstance(outcome, Unavailable)
        assert "the time the server has to stop" in str(outcome)
        assert isinstance(computing.outcome(), Unavailable)
        late = batcher.ask(70)  # Triton had taken it before
        assert "the time the server has to stop" in str(late.outcome())
