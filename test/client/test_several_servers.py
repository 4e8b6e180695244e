"""One client in front of several real servers, by addresses and by names, in the clear and over TLS."""

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
from conftest import REPO, TOY, Address, eventually, free_ports, gateway_running, serving, without_settings
from nv_embed_client import AsyncNVEmbedClient, NVEmbedClient, RetryPolicy, Unavailable
from opentelemetry import propagate, trace
from test_grpc import LoadBalancer

ONCE = RetryPolicy(max_attempts=1)
TEXTS = [f"text {number}" for number in range(40)]
NAMESPACE = ("unshare", "--map-root-user", "--mount", "mount", "--bind", "/etc/hosts", "/etc/hosts")


def has_own_hosts() -> bool:
    """Whether a process may have a hosts file of its own here."""
    with contextlib.suppress(OSError):
        return subprocess.run(NAMESPACE, capture_output=True, check=False).returncode == 0
    return False


@pytest.mark.server
@pytest.mark.parametrize("case", ["list", "name-tls"])
def test_three_servers_share_the_load_and_their_deaths_stops_and_starts_cost_no_call(case):
    if case.startswith("name") and not has_own_hosts():
        pytest.skip("a name for three servers needs unshare and namespaces of users")
    done = subprocess.run(
        [sys.executable, REPO / "benchmarks" / "several_servers.py", "--cases", case, "--seconds", "3"],
        capture_output=True, text=True, timeout=900, check=False, env=without_settings(),
    )  # fmt: skip
    assert done.stdout, done.stderr
    (result,) = json.loads(done.stdout.splitlines()[-1])["results"]
    assert (result["errors"], result["first_errors"], result["wrong_rows"]) == (0, [], 0)
    assert result["least_of_shares"] >= 0.7, result
    assert result["least_of_shares_after"] >= 0.7, result
    assert result["rows"] > 500
    assert done.returncode == 0


@pytest.fixture
def beside_a_dead_one(server):
    """Two addresses; only at the second somebody listens."""
    (port,) = free_ports(1)
    return f"127.0.0.1:{port},{server.url}"


def test_a_server_that_was_never_there_costs_no_call_and_no_retry(beside_a_dead_one, client):
    expected = client.embed_documents(TEXTS)
    with NVEmbedClient(beside_a_dead_one, retry=ONCE) as both:
        assert both.is_ready()
        both.wait_until_ready(60)
        assert both.model_info() == client.model_info()
        np.testing.assert_allclose(both.embed(TEXTS, max_texts_per_request=4).embeddings, expected, atol=1e-5)

    async def main():
        async with AsyncNVEmbedClient(beside_a_dead_one, retry=ONCE) as both:
            return await both.embed_documents(TEXTS)

    np.testing.assert_allclose(asyncio.run(main()), expected, atol=1e-5)


def test_the_gateway_takes_several_servers(beside_a_dead_one, logs):
    with gateway_running(logs / "several.log", beside_a_dead_one) as base:
        for number in range(4):
            body = {"model": "nv-embed-v2", "input": f"text {number}"}
            assert httpx.post(f"{base}/v1/embeddings", json=body, timeout=60, trust_env=False).status_code == 200
        assert httpx.get(f"{base}/health/ready", timeout=60, trust_env=False).status_code == 200


def test_when_no_server_is_there_the_error_says_so(server):
    ports = free_ports(2)
    with NVEmbedClient(",".join(f"127.0.0.1:{port}" for port in ports), retry=RetryPolicy(max_attempts=2)) as nobody:
        assert nobody.is_ready() is False
        with pytest.raises(Unavailable, match="attempt 2, the last"):
            nobody.embed_query("a")
    message = r"servers behind the name of 'dns:///absent\.invalid:8001'"
    with (
        NVEmbedClient("dns:///absent.invalid:8001", retry=ONCE) as unnamed,
        pytest.raises(Unavailable, match=message),
    ):
        unnamed.embed_query("a")


def test_a_name_is_used_with_every_address_that_it_has(server, client):
    # localhost is ::1, too, on most machines; nobody listens there.
    with NVEmbedClient(f"dns:///localhost:{server.grpc}", retry=ONCE) as by_name:
        np.testing.assert_allclose(by_name.embed_documents(TEXTS), client.embed_documents(TEXTS), atol=1e-5)


def test_what_waits_for_a_server_that_fell_silent_moves_to_another(server):
    with (
        contextlib.closing(LoadBalancer(server.grpc)) as balancer,
        NVEmbedClient(f"{balancer.url},{server.url}", retry=ONCE) as both,
    ):
        both.embed(TEXTS, max_texts_per_request=4)
        assert balancer.num_connections == 1
        balancer.silent = True
        balancer.forget()
        assert len(both.embed(TEXTS, max_texts_per_request=4).embeddings) == len(TEXTS)


def test_vectors_of_two_models_are_never_mixed(server, aged_server, caplog):
    caplog.set_level(logging.WARNING, "nv_embed_client")
    with NVEmbedClient(f"{server.url},{aged_server.url}") as both:
        dimensions = {both.embed_query(text).shape[1] for text in TEXTS}
        eventually(lambda: both.embed_query("a") is not None and "is left out" in caplog.text)
        dimensions |= {both.embed_query(text).shape[1] for text in TEXTS}
        assert dimensions == {both.dimension()}


def test_a_server_that_comes_back_with_another_model_while_nobody_asks_is_left_out(server, aged_server, caplog):
    caplog.set_level(logging.WARNING, "nv_embed_client")
    with (
        contextlib.closing(LoadBalancer(server.grpc)) as balancer,
        NVEmbedClient(f"{balancer.url},{server.url}", retry=ONCE) as both,
    ):
        eventually(lambda: both.embed_query("a") is not None and balancer.num_connections)
        dimension = both.dimension()
        balancer.lead_to(aged_server.grpc)
        time.sleep(2.5)  # the client trusts for 2 s; a server needs longer to come back
        assert {both.embed_query(text).shape[1] for text in TEXTS} == {dimension}
        eventually(lambda: both.embed_query("a") is not None and "is left out" in caplog.text)


def test_a_connection_of_the_maximum_age_is_replaced_without_an_error(aged_server):
    with (
        contextlib.closing(LoadBalancer(aged_server.grpc)) as balancer,
        NVEmbedClient(balancer.url, retry=ONCE) as client,
        ThreadPoolExecutor() as threads,
    ):
        for each in [threads.submit(lambda: ask_until(balancer, client, 4)) for _ in range(4)]:
            each.result()


def ask_until(balancer, client, num_connections):
    eventually(lambda: client.embed_documents(TEXTS) is not None and balancer.num_connections >= num_connections)


class Collector(BaseHTTPRequestHandler):
    """Keeps the spans that a server exports as JSON over HTTP."""

    spans: list[dict]

    def do_POST(self):
        exported = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.spans += [
            span
            for resource in exported["resourceSpans"]
            for scope in resource["scopeSpans"]
            for span in scope["spans"]
        ]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def collector(no_proxy):
    spans = []
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Kept", (Collector,), {"spans": spans})) as listening:
        threading.Thread(target=listening.serve_forever).start()
        yield f"http://127.0.0.1:{listening.server_port}/v1/traces", spans
        listening.shutdown()


@pytest.fixture(scope="module")
def aged_server(collector, logs):
    """A server with another model, with traces, and with connections that are old after a second."""
    address = Address(*free_ports(3))
    settings = {"TRACE_URL": collector[0], "TRACE_RATE": "999999", "MAX_CONNECTION_SECONDS": "1"}
    with serving(logs / "aged.log", address, TOY, **settings):
        yield address


def trace_headers():
    headers = {}
    propagate.inject(headers)
    return headers


def context_of(trace_id):
    """As inside a span of an instrumented program."""
    parent = trace.SpanContext(trace_id, 0xABC, is_remote=False, trace_flags=trace.TraceFlags(1))
    return trace.use_span(trace.NonRecordingSpan(parent))


def test_a_trace_goes_through_client_gateway_and_server_to_the_collector(aged_server, collector, logs):
    def traces():
        """Those with a request whose parent is the caller's span."""
        requests = [span for span in collector[1] if span["name"] == "InferRequest"]
        return {int(span["traceId"], 16) for span in requests if int(span.get("parentSpanId") or "0", 16) == 0xABC}

    with NVEmbedClient(aged_server.url, headers=trace_headers) as client:
        client.wait_until_ready(60)
        for trace_id in (0xA1, 0xA2):
            with context_of(trace_id):
                client.embed_query("a")
    with gateway_running(logs / "traced-gateway.log", aged_server.url) as base:
        headers = {"traceparent": f"00-{0xA3:032x}-{0xABC:016x}-01", "tracestate": "vendor=1"}
        body = {"model": "nv-embed-v2", "input": "a"}
        for given in (headers, {"traceparent": b"malformed\xff"}):
            answer = httpx.post(f"{base}/v1/embeddings", json=body, headers=given, timeout=60, trust_env=False)
            assert answer.status_code == 200
    eventually(lambda: traces() == {0xA1, 0xA2, 0xA3})
