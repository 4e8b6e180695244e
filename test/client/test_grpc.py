"""Both clients against a real server, over real gRPC: also over connections that die, and past a proxy."""

import asyncio
import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import MAX_SEQUENCE_TOKENS, cancelled_requests, eventually, is_computing
from nv_embed_client import (
    TASK_INSTRUCTIONS,
    AsyncNVEmbedClient,
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
ONCE = RetryPolicy(max_attempts=1)


@pytest.fixture(params=["sync", "async"])
def kind(request):
    return request.param


def run(kind, url, method, *args, settings=None, **kwargs):
    """Calls a method of a new client of a kind."""
    if kind == "sync":
        with NVEmbedClient(url, **(settings or {})) as client:
            return getattr(client, method)(*args, **kwargs)

    async def main():
        async with AsyncNVEmbedClient(url, **(settings or {})) as client:
            return await getattr(client, method)(*args, **kwargs)

    return asyncio.run(main())


@pytest.fixture
def call(kind, server):
    return lambda method, *args, **kwargs: run(kind, server.url, method, *args, **kwargs)


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


def test_a_text_with_a_nul_is_embedded_whole(call):
    alone, longer = call("embed_queries", ["magnet", "magnet\0 and other subjects"])
    assert not np.allclose(alone, longer, atol=1e-3)
    np.testing.assert_allclose(call("embed_query", "magnet\0 and other subjects")[0], longer, atol=1e-5)


def test_a_text_that_is_too_long_is_cut_or_refused_as_asked(call):
    assert call("embed_documents", [TOO_LONG]).shape[0] == 1
    with pytest.raises(InvalidInput, match=f"at most {MAX_SEQUENCE_TOKENS} tokens"):
        call("embed_documents", [TOO_LONG], truncate="NONE")


def test_a_partial_failure_names_the_text_in_the_servers_words(call, client):
    with pytest.raises(PartialFailure) as caught:
        call("embed", [*DOCUMENTS[:20], TOO_LONG, DOCUMENTS[20]], truncate="NONE", max_texts_per_request=8)
    assert caught.value.failed == (20,)
    assert "text 20 with" in str(caught.value.failures[0].error)
    good = np.delete(caught.value.embeddings, 20, axis=0)
    np.testing.assert_allclose(good, client.embed_documents(DOCUMENTS[:21]), atol=1e-5)


def test_what_the_server_refuses_is_said_in_its_words(call):
    with pytest.raises(InvalidInput, match="at most 8388608 bytes"):
        call("embed_documents", ["x" * (2**23 + 1)])


def test_the_whole_call_ends_at_its_deadline(call):
    start = time.monotonic()
    with pytest.raises((DeadlineExceeded, PartialFailure)):
        call("embed_documents", (TOO_LONG for _ in range(10**6)), timeout=1.5)
    assert time.monotonic() - start < 30


def test_an_unknown_model_is_an_error_at_once(call):
    for method in ("dimension", "model_info"):
        with pytest.raises(ModelNotFound, match=r"expected the name of a model .*'absent'.*; correct it: .* metrics"):
            call(method, settings={"model_name": "absent"})
    with pytest.raises(ModelNotFound, match="absent"):
        call("embed_query", "text", settings={"model_name": "absent"})
    with pytest.raises(DeadlineExceeded, match="check the address, the model's name and"):
        call("wait_until_ready", 0.1, settings={"model_name": "absent"})


def test_an_absent_server_is_not_ready_and_waiting_for_it_ends(kind):
    assert run(kind, "localhost:9", "is_ready") is False
    with pytest.raises(DeadlineExceeded, match=r"localhost:9.*the last answer: "):
        run(kind, "localhost:9", "wait_until_ready", 0.5)
    with pytest.raises(Unavailable, match="attempt 2, the last"):
        run(kind, "localhost:9", "embed_query", "a", settings={"retry": RetryPolicy(max_attempts=2)})


def test_a_server_that_is_up_is_ready(call):
    assert call("is_ready") is True
    call("wait_until_ready", 30)


def test_a_cancelled_call_is_cancelled_on_the_server(server):
    async def main():
        async with AsyncNVEmbedClient(server.url) as client:
            # Different texts, because the same would be computed once and come from the cache.
            bulk = asyncio.create_task(client.embed_documents(f"{number} {TOO_LONG}" for number in range(4000)))
            await asyncio.to_thread(eventually, lambda: is_computing(server))
            assert not bulk.done()
            bulk.cancel()
            with pytest.raises(asyncio.CancelledError):
                await bulk

    before = cancelled_requests(server)
    asyncio.run(main())
    eventually(lambda: cancelled_requests(server) > before)


class LoadBalancer:
    """Passes connections on to a server, and can forget those there are without telling anybody."""

    def __init__(self, port):
        self._port = port
        self._sockets = []
        self._forgotten = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_connections = 0
        self.silent = False  # whether new connections are forgotten from the start
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def forget(self):
        """Swallow what comes over the connections there are, for ever."""
        self._forgotten.update(range(self.num_connections))

    def lead_to(self, port):
        """End the connections there are, and pass new ones on to another server."""
        self._port = port
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self):
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *self._sockets):
            each.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                ends = [self._listener.accept()[0], socket.create_connection(("127.0.0.1", self._port))]
                self._sockets += ends
                if self.silent:
                    self._forgotten.add(self.num_connections)
                for source, sink in (ends, ends[::-1]):
                    thread = threading.Thread(target=self._pass_on, args=(source, sink, self.num_connections))
                    self._threads.append(thread)
                    thread.start()
                self.num_connections += 1

    def _pass_on(self, source, sink, number):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if number not in self._forgotten:
                    sink.sendall(data)


@pytest.fixture
def balancer(server):
    with contextlib.closing(LoadBalancer(server.grpc)) as balancer:
        yield balancer


def test_a_forgotten_connection_is_replaced_within_a_call(balancer):
    with NVEmbedClient(balancer.url, retry=ONCE) as client:
        expected = client.embed_documents(DOCUMENTS)
        balancer.forget()
        # Three requests are on their way over the dead connection; nobody will answer them there.
        np.testing.assert_allclose(client.embed_documents(DOCUMENTS), expected, atol=1e-5)
        assert balancer.num_connections == 2
        balancer.forget()
        assert client.is_ready()
        with NVEmbedClient(balancer.url, request_timeout=3, retry=ONCE) as another:
            another.embed_query("a new client of the same process begins anew")


def test_a_forgotten_connection_is_replaced_within_an_awaited_call(balancer):
    async def main():
        async with AsyncNVEmbedClient(balancer.url, retry=ONCE) as client:
            await client.embed_query("before")
            balancer.forget()
            return await asyncio.gather(*(client.embed_query(f"after {number}") for number in range(8)))

    assert len(asyncio.run(main())) == 8
    assert balancer.num_connections == 2


def test_a_call_that_ends_by_its_deadline_without_a_byte_has_the_next_begin_anew(balancer):
    with NVEmbedClient(balancer.url, request_timeout=1.5, retry=ONCE) as client:
        client.wait_until_ready(60)
        balancer.forget()
        with pytest.raises(DeadlineExceeded):
            client.embed_query("over the dead connection")
        client.embed_query("over a new one", timeout=60)


def test_a_short_call_that_gives_a_dead_connection_up_does_not_leave_the_others_on_it(balancer):
    with NVEmbedClient(balancer.url, request_timeout=600, retry=ONCE) as client, ThreadPoolExecutor() as threads:
        client.embed_query("before")
        balancer.forget()
        long = [threads.submit(client.embed_query, f"long {number}", timeout=300) for number in range(3)]
        with pytest.raises(DeadlineExceeded):
            client.embed_query("short", timeout=1)
        start = time.monotonic()
        for each in long:
            each.result()
        assert time.monotonic() - start < 120


def test_a_server_that_answers_nobody_is_not_flooded_with_connections(balancer):
    with NVEmbedClient(balancer.url, request_timeout=12, retry=ONCE) as client:
        client.embed_query("before")
        balancer.silent = True
        balancer.forget()
        with pytest.raises(DeadlineExceeded):
            client.embed_query("after")
    assert balancer.num_connections <= 5  # one asks for a sign of life every few seconds


def test_a_server_that_only_takes_long_keeps_its_connection(balancer):
    one_request = {"max_texts_per_request": 10**6, "max_bytes_per_request": 2**30}
    with NVEmbedClient(balancer.url, **one_request) as client:
        sample = [f"{number} {'word ' * 100}" for number in range(60)]
        start = time.monotonic()
        client.embed_documents(sample)
        num_texts = int(len(sample) * 8 / (time.monotonic() - start))
        start = time.monotonic()
        client.embed_documents(f"{'another ' * 100}{number}" for number in range(min(num_texts, 9000)))
        assert time.monotonic() - start > 4, "too fast to have been doubted"
    assert balancer.num_connections == 1


class RefusingProxy(BaseHTTPRequestHandler):
    """An HTTP proxy that lets nobody through."""

    def do_CONNECT(self):
        self.send_error(403)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def proxy(monkeypatch):
    """Sets a proxy, as many companies do for all processes; gives its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), RefusingProxy) as refusing:
        threading.Thread(target=refusing.serve_forever).start()
        address = f"127.0.0.1:{refusing.server_port}"
        monkeypatch.setenv("http_proxy", f"http://{address}")
        yield address
        refusing.shutdown()


def test_an_error_names_the_proxy_that_grpc_asked_and_the_remedy(kind, server, proxy, monkeypatch):
    hint = f"http_proxy in the environment .* the proxy {proxy}; .* add localhost to no_proxy .*NO_PROXY"
    with pytest.raises(Unavailable, match=hint):
        run(kind, server.url, "embed_query", "a", settings={"retry": ONCE})
    with pytest.raises(DeadlineExceeded, match=hint):
        run(kind, server.url, "wait_until_ready", 0.5)
    monkeypatch.setenv("no_proxy", "localhost")
    assert run(kind, server.url, "embed_query", "a").shape[0] == 1
