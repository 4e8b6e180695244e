"""Any interleaving of the ledger's events, without threads: every request is answered once, and nothing is lost."""

from __future__ import annotations

import math
import sys
import types
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from nv_embed.errors import ComputeFailed, InvalidRequest
from nv_embed.requests import EmbedRequest
from nv_embed.scheduling import ledger
from nv_embed.scheduling.answers import Answer
from nv_embed.scheduling.ledger import Ledger
from nv_embed.scheduling.policy import BatchLimits, most_small_batches
from nv_embed.scheduling.states import Text
from nv_embed.scheduling.timers import Timers

MAX_BATCH_TOKENS = 100
LONG = 4 * MAX_BATCH_TOKENS  # a text of more tokens is computed alone


class Sequence:
    """So many tokens; equal ones have the same variant."""

    def __init__(self, num_tokens: int, variant: int) -> None:
        self.num_tokens, self.variant = num_tokens, variant

    def digest(self) -> bytes:
        return f"{self.num_tokens}.{self.variant}".encode()


def vector_of(sequence: Sequence) -> np.ndarray:
    return np.array([sequence.num_tokens, sequence.variant], dtype=np.float32)


sequences = st.builds(Sequence, st.sampled_from([1, 7, 30, 60, 99, 101, 399, 401, 900]), st.integers(0, 3))


class Requests(RuleBasedStateMachine):
    """Drives a ledger as threads would, and remembers what it must have become of each request."""

    ledger_class = Ledger
    live = Bundle("live")
    passes = Bundle("passes")

    @initialize(
        cache_bytes=st.sampled_from([0, 700, 10**6]),
        max_queue_tokens=st.sampled_from([1000, 5000]),
        max_queue_texts=st.sampled_from([8, 1000]),
    )
    def start(self, cache_bytes, max_queue_tokens, max_queue_texts):
        self.limits = BatchLimits(
            MAX_BATCH_TOKENS, 1, None, max_queue_tokens, 500, max_queue_texts, 60.0, 8, cache_bytes
        )
        self.ledger = self.ledger_class(self.limits)
        self.now = 1000.0
        self.answered = Counter()
        self.unfinished = set()
        self.given = {}  # request -> its sequences
        self.tokenized = {}  # request -> how many of them are
        self.computing = []  # batches that were chosen and have not come back
        self.stop_at = math.inf
        self.is_over = False

    def settle(self, answers):
        for answer in answers:
            request = answer.request
            self.answered[request] += 1
            assert self.answered[request] == 1, "a request was answered twice"
            self.unfinished.remove(request)
            if isinstance(answer.outcome, Answer):
                expected = self.given[request]
                assert list(answer.outcome.token_counts) == [sequence.num_tokens for sequence in expected]
                assert answer.outcome.embeddings().tolist() == [vector_of(s).tolist() for s in expected]

    # --- events ---

    @rule(
        target=live,
        texts=st.lists(sequences, min_size=1, max_size=6),
        is_query=st.booleans(),
        num_bytes=st.sampled_from([1, 1, 10, 300]),
        timeout=st.sampled_from([None, None, 5.0]),
        num_tokenized=st.sampled_from([0, 3, 6, 6]),
    )
    def submit(self, texts, is_query, num_bytes, timeout, num_tokenized):
        texts = texts[:1] if is_query else texts
        waiting = self.ledger.num_queue_bytes
        spec = EmbedRequest(("",) * len(texts), "", True, is_query, num_bytes, timeout)
        request, answers = self.ledger.submitted(spec, None, self.now)
        self.given[request], self.tokenized[request] = texts, 0
        self.unfinished.add(request)
        self.settle(answers)
        limit = 500 + 500 // 8 * is_query
        if waiting + num_bytes > limit or self.is_over:
            assert request.is_finished
        if not request.is_finished:
            self.tokenize(request, num_tokenized)
        return multiple() if request.is_finished else request

    @rule(request=live, num_texts=st.integers(1, 6))
    def tokenize(self, request, num_texts):
        """The next texts of a request."""
        start = self.tokenized[request]
        sequences = self.given[request][start : start + num_texts]
        if sequences:
            self.tokenized[request] += len(sequences)
            texts = [Text(request, start + i, s, s.digest()) for i, s in enumerate(sequences)]
            self.settle(self.ledger.tokenized(request, texts))

    @rule(request=consumes(live))
    def refuse(self, request):
        if self.tokenized[request] < len(self.given[request]):
            self.settle(self.ledger.refused(request, InvalidRequest("not a text")))
            assert self.answered[request] == 1

    @rule(request=consumes(live))
    def cancel(self, request):
        self.settle(self.ledger.cancelled(request))
        assert self.answered[request] == 1

    @precondition(lambda self: self.ledger.has_work)
    @rule(target=passes, with_long=st.booleans(), num_idle=st.integers(0, 2))
    def choose(self, with_long, num_idle):
        halves = getattr(self, "num_halves", 0) and with_long
        has_work = type(self.ledger).has_work if with_long else type(self.ledger).has_short_work
        for _ in range(4):  # all of a kind may be known already
            batch, answers = self.ledger.chosen(MAX_BATCH_TOKENS, num_idle, with_long=with_long)
            self.settle(answers)
            if batch.entries or not has_work.fget(self.ledger):
                break
        if not batch.entries:
            assert not has_work.fget(self.ledger)
            return multiple()
        self.computing.append(batch)
        assert batch.num_tokens == sum(sequence.num_tokens for sequence in batch.sequences)
        assert batch.num_tokens <= MAX_BATCH_TOKENS or len(batch.entries) == 1 or halves
        assert len({sequence.digest() for sequence in batch.sequences}) == len(batch.entries), "computed twice"
        assert with_long or all(sequence.num_tokens <= LONG for sequence in batch.sequences)
        kinds = set()
        for texts in batch.entries:
            assert any(not text.request.is_finished for text in texts), "computed although nobody wants it"
            assert all(text.sequence.digest() == texts[0].sequence.digest() for text in texts)
            kinds |= {text.request.spec.is_query for text in texts if text.sequence.num_tokens <= LONG}
        assert len(kinds) <= 1, "a batch of queries and documents"
        return batch

    @rule(batch=consumes(passes), bad=st.booleans())
    def compute(self, batch, bad):
        self.computing.remove(batch)
        vectors = [vector_of(sequence) for sequence in batch.sequences]
        if bad:
            vectors[0] = None
        self.settle(self.ledger.computed(batch, vectors))
        assert all(text.request.is_finished for text in batch.entries[0]) or not bad

    @rule(batch=consumes(passes))
    def fail(self, batch):
        self.computing.remove(batch)
        self.settle(self.ledger.failed(batch, ComputeFailed("broken")))
        assert not batch.is_wanted

    @rule(batch=consumes(passes))
    def run_out_of_memory(self, batch):
        self.computing.remove(batch)
        self.settle(self.ledger.did_not_fit(batch, "too large"))
        self.num_halves = 1
        if len(batch.entries) == 1:
            assert not batch.is_wanted

    @rule(target=passes, batch=consumes(passes))
    def give_up(self, batch):
        if batch.is_wanted:
            return batch
        self.computing.remove(batch)
        self.settle(self.ledger.given_up(batch))
        return multiple()

    @rule(seconds=st.sampled_from([0.0, 0.3, 0.3, 4.0, 61.0]))
    def let_time_pass(self, seconds):
        self.now += seconds
        before = list(self.ledger.requests)
        answers, questions = self.ledger.expired(self.now)
        self.settle(answers)
        assert self.ledger.next_timer > self.now
        for request in questions:
            assert not request.is_finished
            assert self.now - request.arrived >= 0.5
        for request in before:
            age = self.now - request.arrived
            is_late = age >= (request.spec.timeout_seconds or math.inf) or self.now >= self.stop_at
            assert request.is_finished == (is_late or (age >= 60.0 and not request.is_started)), "a deadline forgotten"

    @precondition(lambda self: self.now > 1060)
    @rule(seconds=st.sampled_from([1.0, 20.0]))
    def stop_soon(self, seconds):
        self.stop_at = self.now + seconds
        self.ledger.stopping(self.stop_at)
        assert not self.ledger.is_accepting

    @precondition(lambda self: self.now > 1100)
    @rule()
    def stop(self):
        self.is_over = True
        self.settle(self.ledger.stopped())
        assert not self.ledger.requests

    # --- what always holds ---

    @invariant()
    def counts_are_of_what_is_there(self):
        if not hasattr(self, "ledger"):
            return
        unfinished = self.unfinished
        assert self.ledger.requests == unfinished
        chosen = {id(text) for batch in self.computing for texts in batch.entries for text in texts}
        waits = computing = 0
        for request in unfinished:
            sequences = self.given[request]
            if self.tokenized[request] < len(sequences):
                continue
            for text in request.texts:
                if text.vector is None and id(text) not in chosen:
                    waits += text.sequence.num_tokens
                computing += id(text) in chosen
        ledger = self.ledger
        untokenized = [r for r in unfinished if self.tokenized[r] < len(self.given[r])]
        assert ledger.num_queue_bytes == sum(request.spec.num_bytes for request in untokenized)
        assert ledger.num_texts == sum(len(self.given[request]) for request in unfinished)
        if not getattr(self, "num_halves", 0):  # halves wait although they count as chosen
            assert ledger.num_queue_tokens == waits
        assert 0 <= ledger.num_queue_tokens <= self.limits.max_queue_tokens * 9 // 8
        assert ledger.num_queue_bytes <= self.limits.max_queue_bytes * 9 // 8
        assert ledger.num_texts <= self.limits.max_queue_texts * 9 // 8
        assert ledger.cache.num_bytes <= self.limits.cache_bytes

    def teardown(self):
        """Whatever is left is computed to the end: no wanted text is forgotten, and every count goes back to zero."""
        if not hasattr(self, "ledger"):
            return
        for request in self.given:
            if request in self.unfinished:
                self.tokenize(request, 6)
        while self.computing or self.ledger.has_work:
            for batch in list(self.computing):
                self.compute(batch, bad=False)
            self.choose(with_long=True, num_idle=0)
        assert set(self.answered) == set(self.given), "a request without an answer"
        ledger = self.ledger
        assert not ledger.requests
        assert ledger.num_queue_tokens == ledger.num_queue_bytes == ledger.num_texts == 0


def test_every_request_is_answered_once_whatever_happens_in_whatever_order():
    run_state_machine_as_test(Requests, settings=settings(max_examples=150, stateful_step_count=50, deadline=None))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        pytest.param(
            "self.num_queue_tokens -= text.sequence.num_tokens", "pass", id="a count is not taken back",
        ),
        pytest.param(
            "            return []\n        request.is_finished = True\n        self.requests.remove",
            "            pass\n        request.is_finished = True\n        self.requests.discard",
            id="an answer is given twice",
        ),
        pytest.param(
            "self._halves.extendleft([batch.entries[middle:], batch.entries[:middle]])",
            "self._halves.append(batch.entries[:middle])",
            id="a text is left in flight",
        ),
        pytest.param(
            "            self._set_timer(request)\n        return answers, questions",
            "        return answers, questions",
            id="a deadline is forgotten",
        ),
        pytest.param(
            "lambda text: not text.request.is_finished", "lambda text: True", id="a text is computed that nobody wants"
        ),
    ],
)  # fmt: skip
def test_the_test_above_finds_a_bug_put_in_on_purpose(right, wrong):
    source = Path(ledger.__file__).read_text(encoding="utf-8")
    assert source.count(right) == 1
    module = types.ModuleType("broken_ledger")
    sys.modules[module.__name__] = module  # dataclasses look there
    exec(compile(source.replace(right, wrong), ledger.__file__, "exec"), module.__dict__)
    broken = type("Broken", (Requests,), {"ledger_class": module.Ledger})
    # The rarest of these took 6 to 564 examples in six tries. A run ends with the first that finds it.
    many = settings(max_examples=20_000, stateful_step_count=50, deadline=None, phases=[Phase.generate], database=None)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        run_state_machine_as_test(broken, settings=many)


# --- one thing at a time --------------------------------------------------------------------------------


def submitted(ledger, *texts, is_query=False, now=0.0, timeout=None):
    """A request whose texts, numbers of tokens, wait to be computed; its answers besides."""
    spec = EmbedRequest(("",) * len(texts), "", True, is_query, 0, timeout)
    request, answers = ledger.submitted(spec, None, now)
    sequences = [Sequence(num_tokens, i) for i, num_tokens in enumerate(texts)]
    return request, answers + ledger.tokenized(
        request, [Text(request, i, sequence, sequence.digest()) for i, sequence in enumerate(sequences)]
    )


@pytest.fixture
def new_ledger():
    return Ledger(BatchLimits(10_000, 2, None, 10**6, 10**6, 10**6, 60.0, 8, 10**6))


def test_what_waits_is_shared_out_among_the_engines_that_have_nothing_to_do(new_ledger):
    submitted(new_ledger, *[100] * 40)
    assert new_ledger.chosen(10_000, num_idle_engines=1)[0].num_tokens == 2000
    assert new_ledger.chosen(10_000, num_idle_engines=0)[0].num_tokens == 2000


def test_a_vector_that_came_into_the_cache_while_a_text_waited_is_not_computed_again(new_ledger):
    submitted(new_ledger, 20)
    batch, _ = new_ledger.chosen(10_000, 0)
    late, _ = submitted(new_ledger, 20)
    new_ledger.computed(batch, [np.ones(2, np.float32)])
    batch, (answer,) = new_ledger.chosen(10_000, 0)
    assert (batch.entries, answer.request) == ([], late)
    assert new_ledger.tally.num_cached_texts == 1


def test_texts_of_halves_that_nobody_waits_for_any_more_count_as_dropped(new_ledger):
    request, _ = submitted(new_ledger, 10, 20, 30)
    batch, _ = new_ledger.chosen(10_000, 0)
    new_ledger.did_not_fit(batch, "too many")
    new_ledger.cancelled(request)
    assert new_ledger.chosen(10_000, 0)[0].entries == []
    assert new_ledger.tally.num_dropped_texts == 3


def test_what_is_finished_keeps_nothing_large_although_its_deadline_is_far(new_ledger):
    request, _ = submitted(new_ledger, 10, 20, timeout=1e6)
    (answer,) = new_ledger.cancelled(request)
    assert (request.texts, request.spec.texts, request.flow.waiting) == ([], (), type(request.flow.waiting)())
    assert answer.request is request
    assert new_ledger.tally.num_dropped_texts == 2


def test_timers_of_finished_requests_are_forgotten(new_ledger):
    timers, request = Timers(), submitted(new_ledger, 10)[0]
    timers.set(request, 1e6)
    gone, _ = submitted(new_ledger, 10)
    new_ledger.cancelled(gone)
    for _ in range(5000):
        timers.set(gone, 1e6)
    assert len(timers) < 1500
    assert list(timers.due(1e6)) == [request]


def test_a_finished_request_wakes_nobody(new_ledger):
    gone, _ = submitted(new_ledger, 10, now=100.0)
    submitted(new_ledger, 10, now=103.0)
    assert new_ledger.next_timer == 100.5
    new_ledger.cancelled(gone)
    assert new_ledger.next_timer == 103.5


@pytest.mark.parametrize("end", ["computed", "failed", "did_not_fit", "given_up"])
def test_few_tokens_are_left_to_the_engine_that_computes_few_until_it_is_done(end):
    ledger = Ledger(BatchLimits(10_000, 1, None, 10**6, 10**6, 10**6, 60.0, 8, 0))
    submitted(ledger, 100, is_query=True)
    batch, _ = ledger.chosen(10_000, 1)
    submitted(ledger, 100, is_query=True)
    assert not ledger.has_work
    submitted(ledger, 156, is_query=True)
    assert ledger.has_work, "as many as make a batch of their own"
    both, _ = ledger.chosen(10_000, 0)
    assert both.num_tokens == 256
    submitted(ledger, 100, is_query=True)
    assert not ledger.has_work
    arguments = {"computed": [[np.ones(2, np.float32)]], "failed": [ComputeFailed("it broke")], "did_not_fit": ["big"]}
    getattr(ledger, end)(batch, *arguments.get(end, []))
    assert ledger.has_work


def test_few_tokens_are_left_to_nobody_beside_large_batches_and_on_gpus():
    ledger = Ledger(BatchLimits(10_000, most_small_batches(["cuda", "cuda"]), None, 10**6, 10**6, 10**6, 60.0, 8, 0))
    submitted(ledger, 100, is_query=True)
    ledger.chosen(10_000, 1)
    submitted(ledger, 100, is_query=True)
    assert ledger.has_work
    ledger = Ledger(BatchLimits(10_000, 1, None, 10**6, 10**6, 10**6, 60.0, 8, 0))
    submitted(ledger, 300)
    ledger.chosen(10_000, 1)
    submitted(ledger, 100, is_query=True)
    assert ledger.has_work


def test_small_batches_leave_one_or_two_cores_and_never_more_than_half():
    assert [most_small_batches(["cpu"] * n) for n in (1, 2, 3, 4, 8)] == [1, 1, 1, 2, 6]


def test_a_request_is_asked_more_and_more_seldom_whether_it_is_cancelled(new_ledger):
    submitted(new_ledger, 10, now=100.0)
    asked = []
    while (now := new_ledger.next_timer) < 150.0:
        asked += [now - 100.0 for _ in new_ledger.expired(now)[1]]
    assert asked[:3] == [0.5, 1.0, 1.5]
    assert 10 < len(asked) < 30


def test_identical_texts_cost_one_place_in_a_batch():
    ledger = Ledger(BatchLimits(100, 2, None, 10**6, 10**6, 10**6, 60.0, 8, 0))
    same = [submitted(ledger, 30, is_query=True)[0] for _ in range(50)]
    other, _ = submitted(ledger, 35, is_query=True)
    batch, _ = ledger.chosen(100, 0)
    assert [sequence.num_tokens for sequence in batch.sequences] == [30, 35]
    answers = ledger.computed(batch, [np.ones(2, np.float32)] * 2)
    assert {answer.request for answer in answers} == {*same, other}
