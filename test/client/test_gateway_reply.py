"""Large replies are written in slices; and what becomes of errors that no live server can be made to give."""

import asyncio
import base64
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO
from nv_embed_client import EmbedResult
from nv_embed_client.errors import DeadlineExceeded, Failure, PartialFailure, Unavailable
from nv_embed_client.gateway.refusals import of_client_error
from nv_embed_client.gateway.reply import Replies, as_base64

VECTORS = np.random.default_rng(1).standard_normal((300, 4096)).astype(np.float32)


async def sent(replies, events, name, vectors=VECTORS):
    """The body of one reply; each of its pieces is an event."""
    result = EmbedResult(vectors, None)
    response = replies.response(result, lambda index, vector: {"index": index, "vector": vector}, b"[", b"]")
    if not hasattr(response, "body_iterator"):
        return response.body
    pieces = []
    async for piece in response.body_iterator:
        events.append(name)
        pieces.append(piece)
    return b"".join(pieces)


def test_a_sliced_reply_is_the_whole_one():
    items = json.loads(asyncio.run(sent(Replies(), [], "large")))
    assert [item["index"] for item in items] == list(range(len(VECTORS)))
    np.testing.assert_array_equal(np.array([item["vector"] for item in items], np.float32), VECTORS)


@pytest.mark.parametrize("num_vectors", [1, 3, 4, 5, 8, 9])
def test_no_vector_is_lost_where_slices_meet(num_vectors):
    body = asyncio.run(sent(Replies(), [], "large", VECTORS[:num_vectors]))
    assert len(json.loads(body)) == num_vectors


def test_others_have_a_turn_after_each_slice_however_many_replies_are_written():
    async def scenario():
        replies, events, done = Replies(), [], asyncio.Event()

        async def other():
            while not done.is_set():
                events.append("other")
                await asyncio.sleep(0)

        others = asyncio.create_task(other())
        await asyncio.gather(*(sent(replies, events, name) for name in "abc"))
        done.set()
        await others
        return events

    events = asyncio.run(scenario())
    written = "".join(event if event != "other" else " " for event in events)
    slices = len(VECTORS) * VECTORS.shape[1] // 2**14
    assert sum(written.count(name) for name in "abc") >= 3 * slices
    # A reply's last piece comes without a turn of its own: it holds no vectors.
    assert max(len(run) for run in written.split()) <= 3


@pytest.mark.parametrize("dtype", ["f4", "f2", "i1", "u1"])
def test_base64_is_little_endian(dtype):
    vector = np.arange(9).astype(dtype)
    for ours in (vector, vector.astype(f">{dtype}")):
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(as_base64(ours)), f"<{dtype}"), vector)


def test_a_proxy_in_the_way_is_said_to_the_caller_without_its_password():
    error = Unavailable("expected a server; got none through the proxy http://me:secret@proxy:3128/; set no_proxy")
    refusal = of_client_error(error, "model", ["a"], 60.0)
    assert refusal.status_code == 503
    assert refusal.detail == "expected a server; got none through the proxy http://proxy:3128/; set no_proxy"


def test_of_texts_that_were_partly_done_in_time_the_longest_of_the_others_is_named():
    texts = ["x" * 50, "x" * 40, "x" * 10, "x" * 30]
    error = PartialFailure(np.zeros((3, 2), np.float32), [Failure((1, 2), DeadlineExceeded("late"))], complete=False)
    refusal = of_client_error(error, "model", texts, 1.5)
    assert refusal.status_code == 504
    assert "vectors of 4 texts within 1.5 seconds; got none of 3" in refusal.detail
    assert "text 1 is the longest with 40 characters" in refusal.detail


@pytest.mark.slow
def test_the_benchmark_of_large_replies_prints_a_table_and_one_json_line():
    done = subprocess.run(
        [
            *(sys.executable, REPO / "benchmarks" / "gateway_reply.py"),
            *("--texts", "64", "--dimension", "256", "--replies", "1"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert any(line.startswith("/health/live") for line in table)
    result = json.loads(last)
    assert result["benchmark"] == "gateway_reply"
    assert set(result["longest_wait_ms"]) == {"/health/live", "one vector"}
