"""Everything that is not I/O, driven by hand. Needs no server."""

import pickle
import re

import numpy as np
import pytest
from nv_embed_client import (
    QUERY_INSTRUCTION,
    AccessDenied,
    DeadlineExceeded,
    EmbedRequest,
    Failure,
    InvalidInput,
    MockTransport,
    ModelNotFound,
    NVEmbedClient,
    PartialFailure,
    RetryPolicy,
    ServerFailure,
    Unavailable,
    flow,
)
from nv_embed_client.chunking import Chunk, Chunker
from nv_embed_client.flow import Deadline, Send, Sleep
from nv_embed_client.proxy import proxy_hint
from nv_embed_client.wire import error_of

REQUEST = EmbedRequest(("text",), "query")
DRAINING = "Request for unknown model: 'nv-embed-v2' has no available versions"


def attempts_and_error(raised, policy=None, seconds=1000.0):
    """Answers every attempt with the same failure; gives the pauses and how it ends."""
    steps = flow.embed(REQUEST, Deadline.after(seconds), policy or RetryPolicy())
    pauses = []
    step = next(steps)
    while True:
        assert isinstance(step, Send)
        assert step.timeout_seconds <= seconds
        try:
            pause = steps.throw(raised)
        except Exception as error:
            return pauses, error
        assert isinstance(pause, Sleep)
        pauses.append(pause.seconds)
        step = steps.send(None)


@pytest.mark.parametrize(
    ("code", "message"),
    [("UNAVAILABLE", "queue is full"), ("NOT_FOUND", DRAINING), ("CANCELLED", "server is stopping")],
)
def test_a_busy_or_draining_server_is_asked_again_with_growing_pauses(code, message):
    pauses, error = attempts_and_error(error_of(code, message))
    assert len(pauses) == RetryPolicy().max_attempts - 1
    for number, pause in enumerate(pauses):
        full = min(0.1 * 2**number, 5.0)
        assert full / 2 <= pause <= full
    assert isinstance(error, Unavailable)
    assert "attempt 8" in str(error)


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        ("INVALID_ARGUMENT", "bad", InvalidInput),
        ("NOT_FOUND", "Request for unknown model: 'x' is not found", ModelNotFound),
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'key'", AccessDenied),
        ("PERMISSION_DENIED", "no", AccessDenied),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", DeadlineExceeded),
        ("INTERNAL", "broken", ServerFailure),
        ("UNKNOWN", "", ServerFailure),
    ],
)
def test_what_asking_again_does_not_mend_is_asked_once(code, message, kind):
    pauses, error = attempts_and_error(error_of(code, message))
    assert pauses == []
    assert type(error) is kind


def test_no_pause_reaches_past_the_deadline():
    policy = RetryPolicy(first_pause_seconds=5, max_pause_seconds=5)
    pauses, error = attempts_and_error(Unavailable("full"), policy, seconds=1.0)
    assert pauses == []
    assert isinstance(error, Unavailable)


def test_a_request_without_time_left_is_not_sent():
    with pytest.raises(DeadlineExceeded, match="longer timeout"):
        next(flow.embed(REQUEST, Deadline.after(-1), RetryPolicy()))


def test_one_attempt_is_a_policy_too():
    assert attempts_and_error(Unavailable("full"), RetryPolicy(max_attempts=1))[0] == []


def test_a_retry_policy_that_makes_no_sense_is_refused():
    with pytest.raises(InvalidInput, match="max_attempts"):
        RetryPolicy(max_attempts=0)
    with pytest.raises(InvalidInput, match="first_pause_seconds"):
        RetryPolicy(first_pause_seconds=9, max_pause_seconds=1)


@pytest.mark.parametrize(
    ("request_", "name", "shape", "parameters"),
    [
        (EmbedRequest(("a",), "query"), "query", [1], {}),
        (EmbedRequest(("a", "b"), "query"), "documents", [1, 2], {"instruction": QUERY_INSTRUCTION}),
        (EmbedRequest(("a",), truncate="NONE"), "documents", [1, 1], {"truncate": "NONE"}),
        (EmbedRequest(("a", ""), "query", ""), "documents", [1, 2], {"instruction": ""}),
    ],
)
def test_a_request_becomes_the_servers_tensors_and_parameters(request_, name, shape, parameters):
    message = request_.message("model")
    assert message.model_name == "model"
    assert [(tensor.name, list(tensor.shape)) for tensor in message.inputs] == [(name, shape)]
    assert {key: value.string_param for key, value in message.parameters.items()} == parameters
    assert [output.name for output in message.outputs] == ["embeddings"]


def chunked(texts, **limits):
    chunker = Chunker(**{"max_texts": 3, "max_bytes": 10, "instruction_bytes": 0, **limits})
    chunks = [chunker.add(index, text) for index, text in enumerate(texts)] + [chunker.rest()]
    return [chunk.texts for chunk in chunks if chunk is not None]


def test_chunks_are_bounded_by_count():
    assert chunked(["a"] * 7) == [("a",) * 3, ("a",) * 3, ("a",)]


def test_chunks_are_bounded_by_bytes_and_the_instruction_counts_for_each_text():
    assert chunked(["aaaa", "bbbb", "cccc"]) == [("aaaa", "bbbb"), ("cccc",)]
    assert chunked(["éé", "bbbb", "cccc"]) == [("éé", "bbbb"), ("cccc",)]
    assert chunked(["aaaa", "bbbb", "cccc"], instruction_bytes=2) == [("aaaa",), ("bbbb",), ("cccc",)]


def test_a_text_over_the_limit_goes_alone():
    assert chunked(["a", "b" * 50, "c"]) == [("a",), ("b" * 50,), ("c",)]


def test_nothing_gives_no_chunk():
    assert chunked([]) == []


def test_a_servers_message_about_its_request_becomes_one_about_the_call():
    chunk = Chunk((7, 9), ("", ""))
    assert chunk.renumbered("got text 1 with; text 5") == "got text 9 with; text 5"


def test_a_partial_failure_comes_back_from_another_process_as_it_was():
    failures = [Failure((1,), InvalidInput("bad"))]
    error = pickle.loads(pickle.dumps(PartialFailure(np.ones((2, 3), np.float32), failures, complete=False)))
    assert isinstance(error, PartialFailure)
    assert error.failed == (1,)
    assert error.embeddings.shape == (2, 3)
    assert not error.complete
    assert isinstance(error.failures[0].error, InvalidInput)


def sent_and_failure(texts, max_texts, failing, kind=ServerFailure):
    """Embeds texts, one request after the other, before a server that fails each with a text of `failing`."""

    def answer(request):
        for number, text in enumerate(request.texts):
            if text in failing:
                raise kind(f"got text {number}: too much")
        return np.ones((len(request.texts), 2))

    transport = MockTransport(answer)
    retry = RetryPolicy(max_attempts=1)
    with (
        NVEmbedClient(transport=transport, max_in_flight=1, max_texts_per_request=max_texts, retry=retry) as client,
        pytest.raises((ServerFailure, PartialFailure, Unavailable)) as caught,
    ):
        client.embed_documents(texts)
    return ["".join(request.texts) for request in transport.requests], caught.value


def test_a_text_that_the_server_fails_is_found_and_the_others_get_through():
    _, error = sent_and_failure(list("abcdefghij"), 4, "ch")
    assert error.complete
    assert error.failed == (2, 7)
    assert [str(failure.error) for failure in error.failures] == ["got text 2: too much", "got text 7: too much"]


def test_texts_that_fail_in_requests_of_their_own_are_not_in_a_row():
    _, error = sent_and_failure(list("abcdefghijkl"), 3, "cfil")
    assert (error.failed, error.complete) == ((2, 5, 8, 11), True)


def test_a_server_that_fails_three_texts_in_a_row_gets_no_more():
    sent, error = sent_and_failure(list("abcdefghijklmnop"), 8, "abcdefghijklmnop")
    assert sent == ["abcdefgh", "abcd", "ab", "a", "b", "cd", "c"]
    assert isinstance(error, ServerFailure)
    assert "got text 2: too much" in str(error)


def test_texts_that_were_not_sent_are_told_from_those_that_failed():
    sent, error = sent_and_failure(list("abcdefgh"), 2, "c", Unavailable)
    assert sent == ["ab", "cd"]
    assert (error.failed, len(error.embeddings), error.complete) == ((2, 3, 4), 5, False)


@pytest.fixture
def no_proxies(monkeypatch):
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        ({"http_proxy": "http://10.0.0.1:3128"}, "http_proxy"),
        ({"http_proxy": "http://10.0.0.1:3128", "https_proxy": "http://me:secret@proxy:1"}, "https_proxy"),
        ({"https_proxy": "http://proxy:1", "grpc_proxy": "http://proxy:2"}, "grpc_proxy"),
        ({"http_proxy": "http://proxy:1", "no_proxy": "example.com,10.0.0.0/8"}, "http_proxy"),
        ({"http_proxy": "http://proxy:1", "NO_PROXY": "localhost"}, "http_proxy"),
        ({"http_proxy": "http://proxy:1", "no_proxy": "localhost"}, None),
        ({"http_proxy": "http://proxy:1", "no_proxy": " LOCALHOST , a"}, None),
        ({"http_proxy": "http://proxy:1", "no_proxy": "a", "no_grpc_proxy": "host"}, None),
        ({"http_proxy": "http://proxy:1", "no_proxy": "a, ,"}, "http_proxy"),
        ({"http_proxy": "http://proxy:1", "no_proxy": ".localhost"}, None),
        ({"http_proxy": "HTTP://me:secret@proxy:1/"}, "http_proxy"),
        ({"http_proxy": "proxy:1"}, None),
        ({"https_proxy": "https://proxy:1", "http_proxy": "http://proxy:2"}, None),
        ({"https_proxy": "socks5://proxy:1"}, None),
        ({"http_proxy": ""}, None),
        ({"HTTP_PROXY": "http://proxy:1"}, None),
        ({}, None),
    ],
)
def test_a_proxy_that_grpc_would_ask_is_named(monkeypatch, environment, variable):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hint = proxy_hint("localhost:8001")
    if variable is None:
        assert hint is None
    else:
        assert f"the variable {variable} " in hint
        assert re.search(r"through the proxy [a-z0-9.]+:\d+;", hint)
        assert "add localhost to no_proxy" in hint
        assert "secret" not in hint


@pytest.mark.usefixtures("no_proxies")
def test_an_address_in_an_exempt_network_needs_no_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy:1")
    monkeypatch.setenv("no_proxy", "127.0.0.0/8")
    assert proxy_hint("127.0.0.1:8001") is None
    assert proxy_hint("10.0.0.1:8001") is not None
