"""A server with TLS and restricted protocols, and one that drains, stops and comes back."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import trustme
from conftest import TOY, Address, eventually, free_ports, gateway_running, is_computing, serving
from nv_embed_client import TLS, AccessDenied, InvalidInput, NVEmbedClient, RetryPolicy, Unavailable
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

PATIENT = RetryPolicy(max_attempts=200, max_pause_seconds=0.5)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Authority, server and client certificates in PEM files."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority.pem")
    for name, identity in {"server": "localhost", "client": "client.example"}.items():
        issued = authority.issue_cert(identity)
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    return folder


def test_mutual_tls_and_a_restricted_protocol(certificates, logs):
    address = Address(*free_ports(3))
    arguments = [
        "--grpc-use-ssl=true",
        "--grpc-use-ssl-mutual=true",
        f"--grpc-server-cert={certificates / 'server.pem'}",
        f"--grpc-server-key={certificates / 'server.key'}",
        f"--grpc-root-cert={certificates / 'authority.pem'}",
        "--grpc-restricted-protocol=inference:x-key=secret",
    ]
    tls = TLS(certificates / "authority.pem", certificates / "client.key", certificates / "client.pem")
    with serving(logs / "tls.log", address, TOY, *arguments):
        # Triton asks for the header with its own prefix.
        with NVEmbedClient(address.url, tls=tls, headers={"triton-grpc-protocol-x-key": "secret"}) as client:
            client.wait_until_ready(30)
            assert client.embed_documents(["a", "b"]).shape[0] == 2
        key = {"triton-grpc-protocol-x-key": "secret"}
        by_name = f"dns:///localhost:{address.grpc}"
        with NVEmbedClient(by_name, tls=tls, headers=lambda: key) as client:  # a function may tell the headers
            assert client.embed_documents(["a", "b"]).shape[0] == 2
        with NVEmbedClient(by_name, tls=tls) as client, pytest.raises(AccessDenied, match="headers"):
            client.embed_query("a")
        # The certificate is for localhost, and has no address.
        elsewhere = by_name.replace("localhost", "127.0.0.1")
        few = RetryPolicy(max_attempts=2)
        with NVEmbedClient(elsewhere, tls=tls, headers=key, retry=few) as client, pytest.raises(Unavailable):
            client.embed_query("a")
        with NVEmbedClient(address.url, tls=tls) as client:
            start = time.monotonic()
            with pytest.raises(AccessDenied, match="headers"):
                client.embed_query("a")
            assert time.monotonic() - start < 3
        # The gateway embeds with the async client.
        files = {"root-certificates": "authority.pem", "private-key": "client.key", "certificate-chain": "client.pem"}
        options = [f"--triton-{name}={certificates / file}" for name, file in files.items()]
        options += ["--triton-tls", "--triton-header=triton-grpc-protocol-x-key=secret"]
        with gateway_running(logs / "tls-gateway.log", address.url, *options) as base:
            body = {"model": "nv-embed-v2", "input": "a"}
            assert httpx.post(f"{base}/v1/embeddings", json=body, trust_env=False).status_code == 200
        few = RetryPolicy(max_attempts=2)
        with NVEmbedClient(address.url, retry=few) as in_the_clear, pytest.raises(Unavailable):
            in_the_clear.embed_query("a")
        without_key = TLS(certificates / "authority.pem")
        with NVEmbedClient(address.url, tls=without_key, retry=few) as unknown, pytest.raises(Unavailable):
            unknown.embed_query("a")


def test_a_key_without_its_certificate_is_refused():
    with pytest.raises(InvalidInput, match="certificate_chain"):
        TLS(private_key="key.pem")
    with pytest.raises(InvalidInput, match=r"root_certificates; got 'absent.pem': No such file"):
        TLS("absent.pem")
    with pytest.raises(InvalidInput, match=r"root_certificates; got .*null byte"):
        TLS("a\0b.pem")


def ask_until(stop: threading.Event, address: Address, seen: set[tuple[str, bool]]) -> None:
    """What Triton itself answers, noted until told to stop."""
    query = InferInput("query", [1], "BYTES")
    query.set_data_from_numpy(np.array([b"raw"], np.object_))
    with InferenceServerClient(address.url) as raw:
        while not stop.wait(0.05):
            try:
                raw.infer("nv-embed-v2", [query], client_timeout=5)
            except InferenceServerException as error:
                seen.add((error.status(), "no available versions" in error.message()))


def texts_for(seconds: float, client: NVEmbedClient) -> list[str]:
    """So many texts that this server is busy with them for about so long."""
    sample = [f"{number} {'word ' * 100}" for number in range(100)]
    start = time.monotonic()
    client.embed_documents(sample)
    num_texts = int(len(sample) * seconds / (time.monotonic() - start))
    return [f"{'another ' * 100}{number}" for number in range(min(num_texts, 16000))]


def test_a_call_survives_the_restart_of_its_server(logs):
    address = Address(*free_ports(3))
    log = logs / "restart.log"
    stop, seen = threading.Event(), set()
    one_request = 64 * 2**20  # all texts of a call in one, so that all are on their way when the server stops
    with (
        NVEmbedClient(address.url, retry=PATIENT, max_bytes_per_request=one_request) as client,
        ThreadPoolExecutor() as pool,
    ):
        try:
            with serving(log, address, TOY) as process:
                client.wait_until_ready(30)
                texts = texts_for(3.0, client)
                bulk = pool.submit(client.embed, texts, max_texts_per_request=len(texts))
                eventually(lambda: is_computing(address))
                process.send_signal(signal.SIGTERM)
                asking = pool.submit(ask_until, stop, address, seen)
                eventually(lambda: ("StatusCode.NOT_FOUND", True) in seen)  # Triton 24.10's answer while it drains
                query = pool.submit(client.embed_query, "a query sent while the server stops", timeout=60)
                assert bulk.result(30).embeddings.shape[0] == len(texts)  # what was on its way is answered
                process.wait(30)
                stop.set()
                asking.result(10)
                assert not query.done()
            with serving(log, address, TOY):
                assert query.result(30).shape[0] == 1
        finally:
            stop.set()
            client.close()
