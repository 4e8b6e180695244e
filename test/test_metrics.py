"""What a batcher counts, and when that is published."""

from __future__ import annotations

from fakes import WAIT_SECONDS, FakedBatcher, FakeEngine, FakeReply, Published
from nv_embed.errors import Cancelled, InvalidRequest, RequestError
from nv_embed.metrics import SERIES, Metric
from serving import eventually


def test_metrics_count_requests_texts_tokens_and_batches():
    with FakedBatcher(FakeEngine(capacity=50)) as batcher:
        batcher.ask(10, 20).lengths()
        batcher.ask(30, is_query=True).lengths()
        batcher.ask("invalid").outcome()
        batcher.ask(60).outcome()
        batcher.refuse(FakeReply(), InvalidRequest("neither"))
    published = batcher.published
    assert {key[1:]: value for key, value in published.counters.items() if key[0] is Metric.REQUESTS} == {
        ("documents", "ok"): 1,
        ("query", "ok"): 1,
        ("documents", "InvalidRequest"): 1,
        ("documents", "OutOfDeviceMemory"): 1,
        ("unknown", "InvalidRequest"): 1,
    }
    assert published.counters[(Metric.TOKENS,)] == 60
    assert published.counters[Metric.TEXTS, "computed"] == 3
    assert sum(published.observations[Metric.BATCH_TOKENS]) == 60
    assert sum(published.observations[Metric.BATCH_TEXTS]) == 3
    assert len(published.observations[Metric.QUEUE_SECONDS]) == len(batcher.engine.batches)
    assert published.counters[(Metric.OUT_OF_MEMORY,)] == 0
    assert len(published.observations[Metric.COMPUTE_SECONDS]) == 2
    assert published.counters[Metric.REQUEST_SECONDS, "documents"] > 0
    assert published.counters[Metric.REQUEST_SECONDS, "query"] > 0
    assert published.counters[(Metric.TOKENIZE_SECONDS,)] > 0
    assert published.counters[(Metric.ANSWER_SECONDS,)] > 0
    assert published.gauges[Metric.QUEUE_TOKENS] == published.gauges[Metric.QUEUE_BYTES] == 0


def test_metrics_count_halved_batches_and_dropped_texts():
    with FakedBatcher(FakeEngine(capacity=50)) as batcher:
        assert batcher.ask(30, 40).lengths() == [30, 40]
        with batcher.held():
            gone = batcher.ask(20)
            gone.cancelled = True
            assert isinstance(gone.outcome(), Cancelled)
    assert batcher.published.counters[(Metric.OUT_OF_MEMORY,)] == 1
    assert batcher.published.counters[(Metric.DROPPED_TEXTS,)] == 1


def test_metrics_come_while_the_server_runs_and_a_lost_one_loses_no_answer():
    published = Published()

    def publish(update):
        published(update)
        raise RuntimeError("shared memory is full")

    with FakedBatcher(publish=publish) as batcher:
        for num_ok in (1, 2):
            assert batcher.ask(10).lengths() == [10]
            eventually(lambda: published.counters[Metric.REQUESTS, "documents", "ok"] == num_ok, WAIT_SECONDS)  # noqa: B023


def test_every_series_that_is_ever_counted_is_known_beforehand():
    with FakedBatcher(FakeEngine(capacity=50), cache_bytes=10**6) as batcher:
        assert batcher.ask(20).lengths() == batcher.ask(20).lengths() == [20]
        for text in ("invalid", 60, 13):
            batcher.ask(text, is_query=True).outcome()
        batcher.refuse(FakeReply(), InvalidRequest("neither"))
    series = batcher.published.series
    assert series <= set(SERIES)
    sources = {labels for metric, labels in SERIES if metric is Metric.TEXTS}
    assert sources == {labels for metric, labels in series if metric is Metric.TEXTS}
    outcomes = {dict(labels)["outcome"] for metric, labels in SERIES if metric is Metric.REQUESTS}
    errors = {error.__name__ for error in RequestError.__subclasses__()}
    assert outcomes == {"ok"} | errors
