"""Both clients against a real server."""

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import MAX_SEQUENCE_TOKENS, cancelled_requests, eventually
from nv_embed_client import (
    TASK_INSTRUCTIONS,
    AsyncNVEmbedClient,
    ClientClosed,
    DeadlineExceeded,
    InvalidInput,
    ModelNotFound,
    NVEmbedClient,
    PartialFailure,
    RetryPolicy,
    Unavailable,
)

QUERIES = ["how do magnets work?", "42 is the answer to what?", "日本の首都", ""]
DOCUMENTS = [f"Document number {number} is about subject {number % 17}." for number in range(600)]
TOO_LONG = "word " * (2 * MAX_SEQUENCE_TOKENS)


@pytest.fixture(params=["sync", "async"])
def call(request, client, server):
    """Calls a method of either client by name."""
    if request.param == "sync":
        return lambda method, *args, **kwargs: getattr(client, method)(*args, **kwargs)

    def run(method, *args, **kwargs):
        async def main():
            async with AsyncNVEmbedClient(server.url) as client:
                return await getattr(client, method)(*args, **kwargs)

        return asyncio.run(main())

    return run


def test_one_query_is_one_unit_row(call):
    row = call("embed_query", QUERIES[0])
    assert row.shape == (1, call("dimension"))
    assert row.dtype == np.float32
    assert row.flags.writeable
    assert np.linalg.norm(row) == pytest.approx(1, abs=1e-5)


def test_many_queries_are_each_the_same_as_alone(call):
    together = call("embed_queries", QUERIES)
    alone = np.concatenate([call("embed_query", query) for query in QUERIES])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_documents_of_a_generator_come_in_order_whatever_the_requests_are(call, client):
    whole = call("embed_documents", (text for text in DOCUMENTS))
    assert whole.shape[0] == len(DOCUMENTS)
    small = call("embed", DOCUMENTS[:50], max_texts_per_request=7).embeddings
    np.testing.assert_allclose(small, whole[:50], atol=1e-5)
    np.testing.assert_allclose(client.embed_documents([DOCUMENTS[577]])[0], whole[577], atol=1e-5)


def test_requests_are_bounded_by_bytes(server):
    texts = ["x" * 300] * 20
    with NVEmbedClient(server.url, max_bytes_per_request=1000) as client:
        sent, carry_out = [], client._carry_out
        client._carry_out = lambda step: sent.append(step) or carry_out(step)
        assert client.embed_documents(texts).shape[0] == 20
    assert sorted(len(step.request.texts) for step in sent) == [2] + 6 * [3]


def test_a_request_has_a_deadline_without_any_for_the_call(silent):
    with NVEmbedClient(silent, request_timeout=0.5) as client, pytest.raises(DeadlineExceeded):
        client.embed_query("text")


def test_no_texts_give_no_rows(call):
    result = call("embed", [], token_counts=True)
    assert result.embeddings.shape == (0, call("dimension"))
    assert result.token_counts.shape == (0,)


def test_a_query_is_not_a_document_and_an_instruction_makes_one_of_it(call):
    query = call("embed_query", QUERIES[0])
    assert not np.allclose(query, call("embed_documents", [QUERIES[0]]), atol=1e-3)
    claim = call("embed_query", QUERIES[0], instruction=TASK_INSTRUCTIONS["SciFact"])
    assert not np.allclose(query, claim, atol=1e-4)
    as_document = call("embed_documents", [QUERIES[0]], instruction=TASK_INSTRUCTIONS["SciFact"])
    np.testing.assert_allclose(claim, as_document, atol=1e-5)


def test_token_counts_come_when_asked_for(call):
    counts = call("embed", ["a", "a b c d e f g", TOO_LONG], token_counts=True).token_counts
    assert counts.dtype == np.int32
    assert counts[0] < counts[1] < counts[2] == MAX_SEQUENCE_TOKENS
    assert call("embed", ["a"]).token_counts is None


def test_a_text_that_is_too_long_is_cut_or_refused_as_asked(call):
    assert call("embed_documents", [TOO_LONG]).shape[0] == 1
    with pytest.raises(InvalidInput, match=f"at most {MAX_SEQUENCE_TOKENS} tokens"):
        call("embed_documents", [TOO_LONG], truncate="NONE")


def test_a_partial_failure_says_which_texts_and_keeps_the_others(call, client):
    texts = [*DOCUMENTS[:20], TOO_LONG, *DOCUMENTS[20:30], TOO_LONG, "half \ud800 pair"]
    with pytest.raises(PartialFailure) as caught:
        call("embed", texts, truncate="NONE", max_texts_per_request=8)
    error = caught.value
    assert error.failed == (20, 31, 32)
    assert error.complete
    assert error.embeddings.shape[0] == len(texts)
    assert np.isnan(error.embeddings[list(error.failed)]).all()
    good = [index for index in range(len(texts)) if index not in error.failed]
    np.testing.assert_allclose(error.embeddings[good], client.embed_documents(DOCUMENTS[:30]), atol=1e-5)
    messages = " ".join(str(failure.error) for failure in error.failures)
    assert "text 20 with" in messages
    assert "text 31 with" in messages
    assert "surrogate" in messages


def test_a_call_to_a_dead_server_ends_and_says_that_texts_were_left(server):
    taken = []

    def endless():
        number = 0
        while True:
            taken.append(number)
            yield "text"
            number += 1

    client = NVEmbedClient("localhost:9", retry=RetryPolicy(max_attempts=2), max_texts_per_request=2)
    with client, pytest.raises(Unavailable, match="attempt 2, the last"):
        client.embed_documents(endless())
    assert len(taken) < 50


def test_one_str_is_not_an_iterable_of_texts(call):
    with pytest.raises(InvalidInput, match="put it into a list"):
        call("embed_documents", "text")


def test_a_text_that_is_no_str_is_named(call):
    with pytest.raises(PartialFailure, match="NoneType as text 1"):
        call("embed_documents", ["a", None])


@pytest.mark.parametrize(
    "wrong",
    [{"truncate": "START"}, {"timeout": 0}, {"instruction": "\udfff"}, {"timeout": -1.0}],
)
def test_wrong_arguments_are_refused_before_anything_is_sent(call, wrong):
    with pytest.raises(InvalidInput):
        call("embed_documents", ["a"], **wrong)


def test_what_the_server_refuses_is_said_in_its_words(call):
    with pytest.raises(InvalidInput, match="at most 8388608 bytes"):
        call("embed_documents", ["x" * (2**23 + 1)])


def test_the_whole_call_ends_at_its_deadline(call):
    start = time.monotonic()
    with pytest.raises((DeadlineExceeded, PartialFailure)):
        call("embed_documents", (TOO_LONG for _ in range(10**6)), timeout=1.5)
    assert time.monotonic() - start < 6


def test_an_unknown_model_is_an_error_at_once(server):
    with NVEmbedClient(server.url, model_name="absent") as client:
        start = time.monotonic()
        with pytest.raises(ModelNotFound, match="absent"):
            client.embed_query("text")
        assert time.monotonic() - start < 2


def test_an_absent_server_is_not_ready_and_waiting_for_it_ends():
    with NVEmbedClient("localhost:9") as client:
        assert client.is_ready() is False
        with pytest.raises(DeadlineExceeded, match="localhost:9"):
            client.wait_until_ready(0.5)


def test_a_server_that_is_up_is_ready(call):
    assert call("is_ready") is True
    call("wait_until_ready", 5)


def test_a_closed_client_says_so(server):
    client = NVEmbedClient(server.url)
    client.embed_query("text")
    client.close()
    with pytest.raises(ClientClosed):
        client.embed_query("text")
    with pytest.raises(ClientClosed):
        client.is_ready()


@pytest.fixture
def silent():
    """The address of something that accepts connections and never says a word."""
    with socket.create_server(("localhost", 0)) as listener:
        yield f"localhost:{listener.getsockname()[1]}"


def test_closing_a_client_ends_the_calls_of_other_threads(silent):
    client = NVEmbedClient(silent, max_in_flight=2, retry=RetryPolicy(max_attempts=1))
    client._pool_or_none = ThreadPoolExecutor(1)  # so that the requests of most calls have not begun
    outcomes = []

    def work():
        with pytest.raises(ClientClosed) as ended:
            client.embed(DOCUMENTS[:8], max_texts_per_request=1)
        outcomes.append(ended.value)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 30
    while client._pool_or_none._work_queue.qsize() < 7:  # 8 requests of 4 calls, one of them begun
        assert time.monotonic() < until
        time.sleep(0.01)
    client.close()
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == 4


def test_closing_an_async_client_is_not_taken_for_a_cancelled_task(silent):
    async def main():
        client = AsyncNVEmbedClient(silent)
        calls = [asyncio.create_task(client.embed(texts, max_texts_per_request=1)) for texts in (["a"], ["b", "c"])]
        while client._triton_or_none is None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)
        cancelled = asyncio.create_task(client.embed(["d"]))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        await client.close()
        return cancelled.cancelled(), await asyncio.gather(*calls, return_exceptions=True)

    was_cancelled, outcomes = asyncio.run(main())
    assert was_cancelled
    assert all(isinstance(outcome, ClientClosed) for outcome in outcomes), outcomes


def test_a_deadline_holds_before_a_server_that_says_nothing(silent):
    with NVEmbedClient(silent) as client:
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.wait_until_ready(0.5)
        with pytest.raises(DeadlineExceeded):
            client.embed([], timeout=0.5)
        assert time.monotonic() - start < 4


def test_a_server_that_is_gone_is_not_told_as_bad_input():
    texts = ["half of an emoji: \ud83d", *DOCUMENTS[:300]]
    with NVEmbedClient("localhost:9", retry=RetryPolicy(max_attempts=1)) as client, pytest.raises(Unavailable):
        client.embed_documents(texts)


def test_an_async_client_belongs_to_one_event_loop(server):
    client = AsyncNVEmbedClient(server.url)
    asyncio.run(client.embed_query("text"))
    with pytest.raises(ClientClosed, match="event loop"):
        asyncio.run(client.embed_query("text"))


def test_threads_share_a_client(client):
    expected = client.embed_documents(DOCUMENTS[:40])
    results = {}

    def work(number):
        results[number] = client.embed(DOCUMENTS[:40], max_texts_per_request=5).embeddings

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for result in results.values():
        np.testing.assert_allclose(result, expected, atol=1e-5)


def test_a_cancelled_call_is_cancelled_on_the_server(server):
    async def main():
        async with AsyncNVEmbedClient(server.url) as client:
            # Different texts, for the same would be computed once and come from the cache.
            bulk = asyncio.create_task(client.embed_documents(f"{number} {TOO_LONG}" for number in range(4000)))
            await asyncio.sleep(1)
            assert not bulk.done()
            bulk.cancel()
            with pytest.raises(asyncio.CancelledError):
                await bulk

    before = cancelled_requests(server)
    asyncio.run(main())
    eventually(lambda: cancelled_requests(server) > before)


def test_a_progress_bar_is_shown_on_demand(call, capsys):
    call("embed_documents", DOCUMENTS[:30])
    assert capsys.readouterr().err == ""
    call("embed_documents", DOCUMENTS[:30], progress=True)
    assert "30/30" in capsys.readouterr().err
