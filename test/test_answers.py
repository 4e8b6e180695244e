"""Answers leave in the right order, wait for nothing, and are kept by nobody."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest
from fakes import WAIT_SECONDS, FakedBatcher, FakeReply
from nv_embed.errors import InvalidRequest, Unavailable
from nv_embed.metrics import Metric, Recorder
from nv_embed.scheduling.answers import Answer, Outbox
from serving import eventually


def new_outbox(**settings):
    return Outbox(Recorder(), collect=list, publish=lambda update: None, on_lost=lambda: None, **settings)


def answer(num_rows):
    return Answer(np.zeros((num_rows, 4096), dtype=np.float32), np.zeros(num_rows, dtype=np.int32))


@pytest.mark.parametrize(("seconds", "order"), [(60.0, [0, 2, 4, 5, 1, 3]), (0.0, [0, 1, 2, 3, 4, 5])])
def test_small_answers_and_errors_pass_large_answers_that_have_not_waited_long(seconds, order):
    def slowly(outcome):
        begun.release()
        assert gate.wait(WAIT_SECONDS)
        sent.append(outcome)
        return outcome

    sent, begun, gate = [], threading.Semaphore(0), threading.Event()
    outbox = new_outbox(large_waits_seconds=seconds)
    outcomes = [answer(65), answer(66), answer(64), answer(67), Unavailable("full"), answer(1)]
    replies = [FakeReply(slowly) for _ in outcomes]
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

    outbox, rows = new_outbox(), np.zeros((1, 2), dtype=np.float32)
    outbox.put(Sent(), Answer(rows, np.zeros(1, dtype=np.int32)), "query")
    kept = weakref.ref(rows)
    del rows
    eventually(lambda: kept() is None, WAIT_SECONDS)
    outbox.close()


def test_texts_count_until_their_answer_is_sent_although_they_cost_no_computing():
    def slowly(outcome):
        sending.release()
        assert gate.wait(WAIT_SECONDS)
        return outcome

    sending, gate = threading.Semaphore(0), threading.Event()
    with FakedBatcher(cache_bytes=10**6, max_queue_texts=16) as batcher:
        assert batcher.ask(10).lengths() == [10]
        slow = batcher.ask(*[10] * 15, way=slowly)
        assert sending.acquire(timeout=WAIT_SECONDS)  # settled, and not sent
        refused, query = batcher.ask(10, 10), batcher.ask(10, is_query=True)
        gate.set()
        assert slow.lengths() == [10] * 15
        assert "at most 16 texts to wait; got 15 waiting and 2 more; retry later" in str(refused.outcome())
        assert query.lengths() == [10]
        eventually(lambda: batcher.num_unanswered == 0, WAIT_SECONDS)
        assert batcher.ask(*[10] * 16).lengths() == [10] * 16


def test_an_answer_waits_for_one_metric_at_most():
    published, reply = [], FakeReply()

    def publish(update):
        published.append(reply.answered.is_set())
        if len(published) == 1:
            batcher.refuse(reply, InvalidRequest("neither"))

    with FakedBatcher(publish=publish) as batcher:
        batcher.ask(10).lengths()
        assert isinstance(reply.outcome(), InvalidRequest)
    assert published[:2] == [False, True]


def test_an_answer_that_its_way_back_refuses_is_counted_as_what_the_client_got():
    with FakedBatcher() as batcher:
        reply = batcher.ask(10, way=lambda outcome: InvalidRequest("too large to send"))
        assert isinstance(reply.outcome(), InvalidRequest)
    assert batcher.published.counters[Metric.REQUESTS, "documents", "InvalidRequest"] == 1
    assert batcher.published.counters[Metric.REQUESTS, "documents", "ok"] == 0


@pytest.mark.parametrize("error", [RuntimeError("no way to the client"), SystemExit("the thread that answers breaks")])
def test_an_answer_that_is_lost_is_not_counted_and_stops_no_other(error):
    def broken(outcome):
        raise error

    with FakedBatcher() as batcher:
        (computing,) = batcher.hold()
        batcher.refuse(FakeReply(broken), InvalidRequest("neither"))
        assert isinstance(computing.outcome(), Unavailable)
        assert batcher.fatal.wait(WAIT_SECONDS)
    counted = {key: value for key, value in batcher.published.counters.items() if key[0] is Metric.REQUESTS}
    assert counted == {(Metric.REQUESTS, "documents", "Unavailable"): 1}
