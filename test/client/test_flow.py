"""Everything that is not I/O, driven by hand."""

import pickle

import numpy as np
import pytest
from nv_embed_client import (
    AccessDenied,
    DeadlineExceeded,
    Failure,
    InvalidInput,
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
from nv_embed_client.job import Call, Job, Limits
from nv_embed_client.wire import InferRequest, error_of
from tritonclient.utils import InferenceServerException

REQUEST = InferRequest("query", (b"text",), {}, False)
DRAINING = "Request for unknown model: 'nv-embed-v2' has no available versions"


def raw(code, message="message"):
    return InferenceServerException(message, f"StatusCode.{code}")


def attempts_and_error(code, message="message", policy=None, seconds=1000.0):
    """Answers every attempt with the same failure; gives the pauses and how it ends."""
    steps = flow.embed(REQUEST, Deadline.after(seconds), policy or RetryPolicy())
    pauses = []
    step = next(steps)
    while True:
        assert isinstance(step, Send)
        assert step.timeout_seconds <= seconds
        try:
            pause = steps.throw(raw(code, message))
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
    pauses, error = attempts_and_error(code, message)
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
    ],
)
def test_what_asking_again_does_not_mend_is_asked_once(code, message, kind):
    pauses, error = attempts_and_error(code, message)
    assert pauses == []
    assert type(error) is kind


def test_no_pause_reaches_past_the_deadline():
    pauses, error = attempts_and_error(
        "UNAVAILABLE", policy=RetryPolicy(first_pause_seconds=5, max_pause_seconds=5), seconds=1.0
    )
    assert pauses == []
    assert isinstance(error, Unavailable)


def test_a_request_without_time_left_is_not_sent():
    with pytest.raises(DeadlineExceeded, match="longer timeout"):
        next(flow.embed(REQUEST, Deadline.after(-1), RetryPolicy()))


def test_one_attempt_is_a_policy_too():
    assert attempts_and_error("UNAVAILABLE", policy=RetryPolicy(max_attempts=1))[0] == []


def test_an_error_without_a_code_is_the_servers():
    assert type(error_of(InferenceServerException("strange"))) is ServerFailure


def chunked(texts, **limits):
    chunker = Chunker(**{"max_texts": 3, "max_bytes": 10, "instruction_bytes": 0, **limits})
    chunks = [chunker.add(index, text) for index, text in enumerate(texts)] + [chunker.rest()]
    return [chunk.texts for chunk in chunks if chunk is not None]


def test_chunks_are_bounded_by_count():
    assert chunked([b"a"] * 7) == [(b"a",) * 3, (b"a",) * 3, (b"a",)]


def test_chunks_are_bounded_by_bytes_and_the_instruction_counts_for_each_text():
    assert chunked([b"aaaa", b"bbbb", b"cccc"]) == [(b"aaaa", b"bbbb"), (b"cccc",)]
    assert chunked([b"aaaa", b"bbbb", b"cccc"], instruction_bytes=2) == [(b"aaaa",), (b"bbbb",), (b"cccc",)]


def test_a_partial_failure_comes_back_from_another_process_as_it_was():
    failures = [Failure((1,), InvalidInput("bad"))]
    error = pickle.loads(pickle.dumps(PartialFailure(np.ones((2, 3), np.float32), failures, complete=False)))
    assert isinstance(error, PartialFailure)
    assert error.failed == (1,)
    assert error.embeddings.shape == (2, 3)
    assert not error.complete
    assert isinstance(error.failures[0].error, InvalidInput)


def test_after_the_server_failed_nothing_more_is_sent():
    call = Call("passage", None, "END", with_token_counts=False, progress=False, timeout_seconds=None)
    job = Job(["a", "b", "\ud800", "c", "d"], call, Limits(2, 1000, 60.0), RetryPolicy(max_attempts=1))
    chunks = job.chunks()
    first, second = next(chunks), next(chunks)
    steps = job.flow(first)
    assert isinstance(next(steps), Send)
    with pytest.raises(StopIteration) as ended:
        steps.throw(raw("UNAVAILABLE"))
    job.record(ended.value.value)
    with pytest.raises(StopIteration) as ended:  # nothing to send first
        next(job.flow(second))
    job.record(ended.value.value)
    assert not list(chunks)
    with pytest.raises(Unavailable):
        job.result()


def answer(job, chunk, fails):
    """Runs the flow of a chunk before a server that fails each request with a text of `fails`; gives what was sent."""
    steps, sent = job.flow(chunk), []
    try:
        step = next(steps)
        while True:
            sent.append(step.request.texts)
            if fails.intersection(step.request.texts):
                number = next(i for i, text in enumerate(step.request.texts) if text in fails)
                step = steps.throw(raw("INTERNAL", f"got text {number}: too much"))
            else:
                step = steps.send(Reply(len(step.request.texts)))
    except StopIteration as ended:
        job.record(ended.value)
    return sent


class Reply:
    def __init__(self, num_texts):
        self._num_texts = num_texts

    def as_numpy(self, name):
        assert name == "embeddings"
        return np.ones((self._num_texts, 2), np.float32)


def test_a_text_that_the_server_fails_is_found_and_the_others_get_through():
    call = Call("passage", None, "END", with_token_counts=False, progress=False, timeout_seconds=None)
    job = Job(list("abcdefghij"), call, Limits(4, 1000, 60.0), RetryPolicy())
    for chunk in job.chunks():
        answer(job, chunk, {b"c", b"h"})
    with pytest.raises(PartialFailure, match="text 2: too much") as caught:
        job.result()
    assert caught.value.complete
    assert caught.value.failed == (2, 7)
    assert [str(failure.error) for failure in caught.value.failures] == [
        "INTERNAL: got text 2: too much",
        "INTERNAL: got text 7: too much",
    ]


def test_texts_that_fail_in_requests_of_their_own_are_not_in_a_row():
    call = Call("passage", None, "END", with_token_counts=False, progress=False, timeout_seconds=None)
    job = Job(list("abcdefghijkl"), call, Limits(3, 1000, 60.0), RetryPolicy())
    for chunk in job.chunks():
        answer(job, chunk, {b"c", b"f", b"i", b"l"})
    with pytest.raises(PartialFailure) as caught:
        job.result()
    assert (caught.value.failed, caught.value.complete) == ((2, 5, 8, 11), True)


def test_a_server_that_fails_three_texts_in_a_row_gets_no_more():
    call = Call("passage", None, "END", with_token_counts=False, progress=False, timeout_seconds=None)
    job = Job(list("abcdefghijklmnop"), call, Limits(8, 1000, 60.0), RetryPolicy())
    chunks = job.chunks()
    sent = answer(job, next(chunks), {letter.encode() for letter in "abcdefghijklmnop"})
    assert [b"".join(texts) for texts in sent] == [b"abcdefgh", b"abcd", b"ab", b"a", b"b", b"cd", b"c"]
    assert not list(chunks)
    with pytest.raises(ServerFailure, match="got text 2: too much"):
        job.result()


def test_texts_that_were_not_sent_are_told_from_those_that_failed():
    call = Call("passage", None, "END", with_token_counts=False, progress=False, timeout_seconds=None)
    job = Job(list("abcdefgh"), call, Limits(2, 1000, 60.0), RetryPolicy(max_attempts=1))
    chunks = job.chunks()
    answer(job, next(chunks), set())
    steps = job.flow(next(chunks))
    next(steps)
    with pytest.raises(StopIteration) as ended:
        steps.throw(raw("UNAVAILABLE"))
    job.record(ended.value.value)
    assert not list(chunks)
    with pytest.raises(PartialFailure) as caught:
        job.result()
    error = caught.value
    assert (error.failed, len(error.embeddings), error.complete) == ((2, 3, 4), 5, False)


def test_a_text_over_the_limit_goes_alone():
    assert chunked([b"a", b"b" * 50, b"c"]) == [(b"a",), (b"b" * 50,), (b"c",)]


def test_nothing_gives_no_chunk():
    assert chunked([]) == []


def test_a_servers_message_about_its_request_becomes_one_about_the_call():
    chunk = Chunk((7, 9), (b"", b""))
    assert chunk.renumbered("got text 1 with; text 5") == "got text 9 with; text 5"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "http://localhost:8000"}, "leave out the scheme"),
        ({"url": "localhost"}, "host:port"),
        ({"headers": {"Key": "v"}}, "header names of lower-case letters.*got 'Key'"),
        ({"headers": {"key": "v\n"}}, "printable ASCII characters for the header 'key'; got others"),
        ({"request_timeout": 0}, "request_timeout of more than 0"),
        ({"max_in_flight": 0}, "max_in_flight"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings, message):
    with pytest.raises(InvalidInput, match=message):
        NVEmbedClient(**settings)


def test_a_retry_policy_that_makes_no_sense_is_refused():
    with pytest.raises(InvalidInput, match="max_attempts"):
        RetryPolicy(max_attempts=0)
    with pytest.raises(InvalidInput, match="first_pause_seconds"):
        RetryPolicy(first_pause_seconds=9, max_pause_seconds=1)
