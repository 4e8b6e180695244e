"""Both clients over a mock transport: what they send, how they end, what their settings mean. Needs no server."""

import asyncio
import copy
import dataclasses
import inspect
import json
import pickle
import re
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest
from nv_embed_client import (
    TASK_INSTRUCTIONS,
    AsyncNVEmbedClient,
    ClientClosed,
    DeadlineExceeded,
    EmbedResult,
    InvalidInput,
    MockTransport,
    ModelInfo,
    NVEmbedClient,
    NVEmbedEncoder,
    PartialFailure,
    RetryPolicy,
    ServerFailure,
    Transport,
    Unavailable,
)

ONCE = RetryPolicy(max_attempts=1)
QUICK = RetryPolicy(max_attempts=3, first_pause_seconds=0.01)


def silent(request):
    """A server that never answers."""
    return Future()


def absent(request):
    raise Unavailable("connection refused")


@pytest.fixture(params=["sync", "async"])
def call(request):
    """Calls a method of either client, made for this call."""

    def run_sync(method, *args, transport=None, settings=None, **kwargs):
        with NVEmbedClient(transport=transport or MockTransport(dimension=8), **(settings or {})) as client:
            return getattr(client, method)(*args, **kwargs)

    def run_async(method, *args, transport=None, settings=None, **kwargs):
        async def main():
            transport_or_new = transport or MockTransport(dimension=8)
            async with AsyncNVEmbedClient(transport=transport_or_new, **(settings or {})) as client:
                return await getattr(client, method)(*args, **kwargs)

        return asyncio.run(main())

    return run_sync if request.param == "sync" else run_async


def test_the_methods_of_both_clients_have_the_same_arguments_and_documentation():
    for name in ("embed_query", "embed_queries", "embed_documents", "embed", "dimension", "model_info", "is_ready"):
        sync, awaited = getattr(NVEmbedClient, name), getattr(AsyncNVEmbedClient, name)
        assert inspect.signature(sync) == inspect.signature(awaited)
        assert sync.__doc__ == awaited.__doc__
        assert (sync.__name__, awaited.__qualname__) == (name, f"AsyncNVEmbedClient.{name}")
        assert inspect.iscoroutinefunction(awaited)
        assert not inspect.iscoroutinefunction(sync)
    assert "instruction" in inspect.signature(NVEmbedClient.embed_query).parameters
    assert "Embeddings" in str(inspect.signature(NVEmbedClient.embed_query).return_annotation)


def test_queries_and_documents_are_sent_as_such(call):
    transport = MockTransport(dimension=8)
    assert call("embed_query", "a", transport=transport).shape == (1, 8)
    assert call("embed_queries", ["b", "c"], transport=transport, truncate="NONE").shape == (2, 8)
    assert call("embed_documents", ["d"], transport=transport, instruction="Find: ").shape == (1, 8)
    assert [(sent.texts, sent.input_type, sent.instruction, sent.truncate) for sent in transport.requests] == [
        (("a",), "query", None, "END"),
        (("b", "c"), "query", None, "NONE"),
        (("d",), "passage", "Find: ", "END"),
    ]


def test_a_mock_answers_the_same_text_with_the_same_unit_vector():
    client = NVEmbedClient(transport=MockTransport())
    first, again = client.embed_documents(["a", "b"]), client.embed_documents(["b", "a"])
    np.testing.assert_array_equal(first, again[::-1])
    assert first.shape == (2, 4096)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
    assert not np.allclose(client.embed_query("a"), first[:1])


def test_rows_come_in_input_order_whatever_the_requests_are(call):
    transport = MockTransport(lambda request: [[float(text)] for text in request.texts])
    rows = call("embed", (str(n) for n in range(100)), transport=transport, max_texts_per_request=7).embeddings
    assert rows[:, 0].tolist() == list(range(100))
    assert rows.flags.writeable
    assert {len(request.texts) for request in transport.requests} == {7, 2}


def test_replies_in_any_order_come_in_input_order(call):
    held = []

    def last_first(request):
        held.append((request, Future()))
        if len(held) == 3:
            for sent, future in reversed(held):
                numbers = [[float(text)] for text in sent.texts]
                future.set_result(EmbedResult(np.array(numbers, np.float32), None))
        return held[-1][1]

    settings = {"max_texts_per_request": 2}
    rows = call("embed_documents", list("012345"), transport=MockTransport(last_first), settings=settings)
    assert rows[:, 0].tolist() == list(range(6))


def test_no_more_requests_than_allowed_are_on_their_way(call):
    open_now, most = set(), []

    def answered_by_a_thread(request):
        future = Future()
        open_now.add(request.texts)
        most.append(len(open_now))

        def answer():
            open_now.remove(request.texts)
            future.set_result(EmbedResult(np.ones((1, 2), np.float32), None))

        threading.Timer(0.01, answer).start()
        return future

    settings = {"max_in_flight": 3, "max_texts_per_request": 1}
    transport = MockTransport(answered_by_a_thread)
    assert call("embed_documents", map(str, range(20)), transport=transport, settings=settings).shape == (20, 2)
    assert max(most) == 3


def test_requests_are_bounded_by_bytes(call):
    transport = MockTransport(dimension=8)
    settings = {"max_bytes_per_request": 1000}
    assert call("embed_documents", ["x" * 300] * 20, transport=transport, settings=settings).shape == (20, 8)
    assert sorted(len(request.texts) for request in transport.requests) == [2] + 6 * [3]


def test_no_texts_give_no_rows(call):
    result = call("embed", [], token_counts=True)
    assert result.embeddings.shape == (0, 8)
    assert result.token_counts.shape == (0,)


def test_a_client_says_what_the_model_is_and_asks_each_time(call):
    transport = MockTransport(dimension=8)
    assert call("model_info", transport=transport) == transport.info
    assert call("dimension", transport=transport) == 8
    transport.info = dataclasses.replace(transport.info, fingerprint="another", dimension=9)
    with NVEmbedClient(transport=transport) as client:
        first = client.model_info()
        transport.info = dataclasses.replace(first, fingerprint="a third")
        assert (first.fingerprint, client.model_info().fingerprint) == ("another", "a third")
    assert transport.requests == []


def test_of_a_server_too_old_to_say_the_dimension_is_that_of_a_vector(call):
    transport = MockTransport(lambda request: [[1.0, 0.0, 0.0]] * len(request.texts))
    assert call("dimension", transport=transport) == 3
    assert len(transport.requests) == 1
    with pytest.raises(ServerFailure, match="got an older one; update the server"):
        call("model_info", transport=transport)
    assert call("dimension", transport=MinimalTransport()) == 2


class MinimalTransport(Transport):
    """One that was written before there was `model_info`."""

    def embed(self, request, timeout_seconds):
        return MockTransport(lambda request: [[1.0, 0.0]] * len(request.texts)).embed(request, timeout_seconds)

    def is_ready(self, timeout_seconds):
        return MockTransport().is_ready(timeout_seconds)


def test_several_queries_in_one_request_have_the_prompt_of_the_served_model(call):
    transport = MockTransport(dimension=8)
    transport.info = dataclasses.replace(transport.info, query_prompt="query: ")
    call("embed_queries", ["a", "b", "c"], transport=transport)
    call("embed_queries", ["a", "b"], transport=transport, instruction="Find: ")
    messages = [request.message("model") for request in transport.requests]
    assert [message.parameters["instruction"].string_param for message in messages] == ["query: ", "Find: "]


@pytest.mark.parametrize(
    ("text", "got"),
    [
        (b"{", "JSONDecodeError"),
        (b"[]", "TypeError"),
        (b'{"name": "a"}', "KeyError('kind')"),
        (b"\xff", "UnicodeDecodeError"),
    ],
)
def test_a_description_that_is_none_is_the_servers_failure(text, got):
    with pytest.raises(ServerFailure, match=rf"expected model_info as JSON .*; got {re.escape(got)}"):
        ModelInfo.of_json(text)


def test_a_description_has_the_types_that_it_says_and_may_have_more_fields():
    told = dataclasses.asdict(MockTransport(dimension=8).info)
    assert ModelInfo.of_json(json.dumps(told | {"later": [1]})) == MockTransport(dimension=8).info
    with pytest.raises(ServerFailure, match="got dimension of type str and not int; update"):
        ModelInfo.of_json(json.dumps(told | {"dimension": "8"}))


def test_token_counts_come_when_asked_for(call):
    assert call("embed", ["a", "a b c"], token_counts=True).token_counts.tolist() == [1, 3]
    assert call("embed", ["a"]).token_counts is None


def test_a_busy_server_is_asked_again(call):
    answers = [Unavailable("full"), Unavailable("full"), None]

    def busy(request):
        if (error := answers.pop(0)) is not None:
            raise error
        return [[1.0]]

    assert call("embed_query", "a", transport=MockTransport(busy), settings={"retry": QUICK}).shape == (1, 1)
    with pytest.raises(Unavailable, match="attempt 3, the last"):
        call("embed_query", "a", transport=MockTransport(absent), settings={"retry": QUICK})


def test_a_partial_failure_says_which_texts_and_keeps_the_others(call):
    def refuse_long(request):
        for number, text in enumerate(request.texts):
            if len(text) > 9:
                raise InvalidInput(f"got text {number} with too much")
        return [[float(text)] for text in request.texts]

    texts = [*map(str, range(20)), "1" * 10, *map(str, range(10)), "2" * 10, "half \ud800 pair"]
    transport = MockTransport(refuse_long)
    with pytest.raises(PartialFailure) as caught:
        call("embed", texts, transport=transport, truncate="NONE", max_texts_per_request=8)
    error = caught.value
    assert error.failed == (20, 31, 32)
    assert error.complete
    assert np.isnan(error.embeddings[list(error.failed)]).all()
    assert error.embeddings[:20, 0].tolist() == list(range(20))
    messages = " ".join(str(failure.error) for failure in error.failures)
    assert "text 20 with" in messages
    assert "text 31 with" in messages
    assert "surrogate" in messages


def test_a_call_to_a_dead_server_ends_and_says_that_texts_were_left(call):
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield "text"

    settings = {"retry": ONCE, "max_texts_per_request": 2}
    with pytest.raises(Unavailable, match="attempt 1, the last"):
        call("embed_documents", endless(), transport=MockTransport(absent), settings=settings)
    assert len(taken) < 50


def test_a_server_that_is_gone_is_not_told_as_bad_input(call):
    texts = ["half of an emoji: \ud83d", *map(str, range(300))]
    with pytest.raises(Unavailable):
        call("embed_documents", texts, transport=MockTransport(absent), settings={"retry": ONCE})


def test_a_reply_that_does_not_fit_the_request_is_the_servers_failure(call):
    with pytest.raises(ServerFailure, match=r"float32 \[1, dim\]; got float32 \[2, 1\]"):
        call("embed_query", "a", transport=MockTransport(lambda request: [[1.0], [2.0]]))
    only_vectors = MockTransport(lambda request: EmbedResult(np.ones((1, 2), np.float32), None))
    with pytest.raises(ServerFailure, match="token_counts of 1 texts"):
        call("embed", ["a"], token_counts=True, transport=only_vectors)


def test_an_error_of_the_callers_iterable_reaches_the_caller(call):
    def texts():
        yield from ["a", "b"]
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        call("embed_documents", texts(), settings={"max_texts_per_request": 1})


def test_one_str_is_not_an_iterable_of_texts(call):
    with pytest.raises(InvalidInput, match="put it into a list"):
        call("embed_documents", "text")


def test_a_text_that_is_no_str_is_named(call):
    with pytest.raises(PartialFailure, match="NoneType as text 1"):
        call("embed_documents", ["a", None])


@pytest.mark.parametrize(
    "wrong",
    [
        {"truncate": "START"},
        {"timeout": 0},
        {"timeout": -1.0},
        {"instruction": "\udfff"},
        {"instruction": "Find\0: "},
        {"instruction": 7},
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_sent(call, wrong):
    transport = MockTransport()
    with pytest.raises(InvalidInput):
        call("embed_documents", ["a"], transport=transport, **wrong)
    assert transport.requests == []


def test_a_nul_is_refused_in_an_instruction_and_sent_in_a_text(call):
    with pytest.raises(InvalidInput, match=r"without NUL.*a NUL at position 4; take it out"):
        call("embed_query", "a", instruction="Find\0: ")
    transport = MockTransport(dimension=8)
    call("embed_documents", ["a\0b"], transport=transport)
    assert transport.requests[0].texts == ("a\0b",)


def test_a_nul_is_refused_where_an_encoders_prompt_enters():
    client = NVEmbedClient(transport=MockTransport(dimension=8))
    with pytest.raises(InvalidInput, match="NUL"):
        NVEmbedEncoder(client, prompts={"mine": "a\0b"})
    with pytest.raises(InvalidInput, match="NUL"):
        NVEmbedEncoder(client).encode("a", prompt="a\0b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "http://localhost:8000"}, "leave out the scheme"),
        ({"url": "localhost"}, "host:port"),
        ({"url": "local\0host:8001"}, "host:port"),
        ({"url": "localhost:8001 "}, "host:port"),
        ({"url": "one:8001,other:8001,ONE:8001"}, "different servers; got 'ONE:8001' twice"),
        ({"url": "localhost:73537"}, "host:port"),  # 8001 modulo 65,536
        ({"url": "localhost:0"}, "host:port"),
        ({"model_name": "nv-embed-v2\0x"}, "model name.*NUL"),
        ({"model_name": ""}, "model name that is not empty"),
        ({"headers": {"Key": "v"}}, "header names of lower-case letters.*got 'Key'"),
        ({"headers": {"key-bin": "v"}}, "not ending in '-bin'"),
        ({"headers": {"key": "v\n"}}, "printable ASCII characters for the header 'key'; got others"),
        ({"headers": {"key": "v\0"}}, "printable ASCII characters for the header 'key'; got others"),
        ({"request_timeout": 0}, "request_timeout of more than 0"),
        ({"max_in_flight": 0}, "max_in_flight"),
    ],
)
@pytest.mark.parametrize("kind", [NVEmbedClient, AsyncNVEmbedClient])
def test_settings_that_make_no_sense_are_refused_by_name(kind, settings, message):
    with pytest.raises(InvalidInput, match=message):
        kind(**settings)


def test_a_client_shows_its_settings_and_keeps_its_keys_to_itself():
    client = NVEmbedClient("host:1", headers={"authorization": "secret"}, request_timeout=5)
    assert (client.url, client.request_timeout, client.headers) == ("host:1", 5, {"authorization": "secret"})
    assert "url='host:1'" in repr(client)
    assert "secret" not in repr(client)
    with pytest.raises(AttributeError):
        client.url = "other:1"


def test_readiness_is_what_the_transport_says(call):
    assert call("is_ready") is True
    call("wait_until_ready", 5)
    transport = MockTransport()
    transport.ready = False
    assert call("is_ready", transport=transport) is False
    with pytest.raises(DeadlineExceeded, match=r"localhost:8001; got none in time \(the last answer: the model is not"):
        call("wait_until_ready", 0.2, transport=transport)


class NeverEnding(Transport):
    """Breaks its promise that a request ends by its deadline."""

    def __init__(self):
        self.sent = []

    def embed(self, request, timeout_seconds):
        self.sent.append(Future())
        return self.sent[-1]

    def is_ready(self, timeout_seconds):
        return self.embed(None, timeout_seconds)


def test_waiting_never_outlasts_a_deadline_whatever_the_transport_does(call):
    transport = NeverEnding()
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        call("embed_documents", ["a", "b"], transport=transport, settings={"max_texts_per_request": 1}, timeout=0.1)
    with pytest.raises(DeadlineExceeded):
        call("embed", [], transport=transport, timeout=0.1)
    assert time.monotonic() - start < 20
    assert all(future.cancelled() for future in transport.sent)


def test_a_closed_client_says_so_and_so_do_its_copies():
    client = NVEmbedClient(transport=MockTransport(dimension=8))
    client.embed_query("text")
    client.close()
    for closed in (client, copy.copy(client), copy.deepcopy(client), pickle.loads(pickle.dumps(client))):
        with pytest.raises(ClientClosed):
            closed.embed_query("text")
        with pytest.raises(ClientClosed):
            closed.is_ready()


def test_closing_a_client_ends_the_calls_of_other_threads():
    asked = threading.Semaphore(0)

    def never(request):
        asked.release()
        return Future()

    client = NVEmbedClient(transport=MockTransport(never), max_in_flight=2, max_texts_per_request=1)
    pausing = NVEmbedClient(
        transport=MockTransport(lambda request: asked.release() or absent(request)),
        retry=RetryPolicy(first_pause_seconds=60, max_pause_seconds=60),
    )
    outcomes = []

    def work(client):
        with pytest.raises(ClientClosed, match="closed meanwhile") as ended:
            client.embed(list("abcdefgh"))
        outcomes.append(ended.value)

    threads = [threading.Thread(target=work, args=(each,), daemon=True) for each in 4 * [client] + [pausing]]
    for thread in threads:
        thread.start()
    for _ in range(4 * 2 + 1):
        assert asked.acquire(timeout=60)
    client.close()
    pausing.close()
    for thread in threads:
        thread.join(60)
    assert len(outcomes) == 5


def test_closing_an_async_client_is_not_taken_for_a_cancelled_task():
    async def main():
        transport = MockTransport(silent)
        client = AsyncNVEmbedClient(transport=transport, max_texts_per_request=1)
        calls = [asyncio.create_task(client.embed(texts)) for texts in (["a"], ["b", "c"])]
        cancelled = asyncio.create_task(client.embed(["d"]))
        while len(transport.requests) < 4:
            await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        await client.close()
        return cancelled.cancelled(), await asyncio.gather(*calls, return_exceptions=True)

    was_cancelled, outcomes = asyncio.run(main())
    assert was_cancelled
    assert all(isinstance(outcome, ClientClosed) for outcome in outcomes), outcomes


@pytest.mark.parametrize("num_turns", range(8))
def test_a_task_that_is_cancelled_as_an_answer_arrives_ends_at_once(num_turns):
    async def main():
        answers = [Future(), Future()]  # the second never comes
        transport = MockTransport(lambda request: answers[len(transport.requests) - 1], dimension=8)
        client = AsyncNVEmbedClient(transport=transport, max_in_flight=1, max_texts_per_request=1)
        call = asyncio.create_task(client.embed(["a", "b"]))
        while not transport.requests:
            await asyncio.sleep(0)
        answers[0].set_result(transport.requests[0].checked(EmbedResult(np.eye(1, 8, dtype=np.float32), None, None)))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call], timeout=10)
        return call.cancelled()

    assert asyncio.run(main())


def test_an_async_client_serves_one_event_loop_after_the_other():
    client = AsyncNVEmbedClient(transport=MockTransport(dimension=8))
    assert [asyncio.run(client.embed_query("text")).shape for _ in range(2)] == [(1, 8), (1, 8)]


def test_threads_share_a_client():
    transport = MockTransport(lambda request: [[float(text)] for text in request.texts])
    client = NVEmbedClient(transport=transport, max_texts_per_request=5)
    results = {}

    def work(number):
        results[number] = client.embed_documents(map(str, range(number, number + 40)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        assert results[number][:, 0].tolist() == list(range(number, number + 40))


def test_a_progress_bar_is_shown_on_demand(call, capsys):
    call("embed_documents", list("abc"))
    assert capsys.readouterr().err == ""
    call("embed_documents", list("abc"), progress=True)
    assert "3/3" in capsys.readouterr().err


def test_the_instructions_of_tasks_reach_the_server(call):
    transport = MockTransport(dimension=8)
    call("embed_query", "aspirin", transport=transport, instruction=TASK_INSTRUCTIONS["SciFact"])
    assert transport.requests[0].instruction.startswith("Instruct: Given a scientific claim")
