"""What a stranger may try: administrative protocols, plain connections to a TLS port, clients without a certificate."""

from __future__ import annotations

import socket
import subprocess
import urllib.error
import urllib.request

import pytest
import tritonclient.grpc as triton
from serving import MODEL_NAME, Server, bytes_input

ADMINISTRATION = {
    "read the configuration": lambda client, **key: client.get_model_config(MODEL_NAME, **key),
    "list the repository": lambda client, **key: client.get_model_repository_index(**key),
    "unload the model": lambda client, **key: client.unload_model(MODEL_NAME, **key),
    "read statistics": lambda client, **key: client.get_inference_statistics(**key),
    "register shared memory": lambda client, **key: client.register_system_shared_memory("x", "/x", 64, **key),
    "change tracing": lambda client, **key: client.get_trace_settings(**key),
    "change logging": lambda client, **key: client.get_log_settings(**key),
}


@pytest.mark.parametrize("attempt", ADMINISTRATION)
def test_administration_over_grpc_is_shut_without_the_key(toy_server, attempt):
    for headers in ({}, {"triton-grpc-protocol-nv-embed-admin": "guess"}):
        with pytest.raises(triton.InferenceServerException, match="restricted") as caught:
            ADMINISTRATION[attempt](toy_server.client, headers=headers)
        assert caught.value.status() == "StatusCode.UNAVAILABLE"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (f"v2/models/{MODEL_NAME}/config", None),
        ("v2/repository/index", b"{}"),
        (f"v2/repository/models/{MODEL_NAME}/unload", b"{}"),
        (f"v2/models/{MODEL_NAME}/stats", None),
        ("v2/systemsharedmemory/status", None),
        ("v2/trace/setting", None),
        ("v2/logging", b'{"log_verbose_level": 9}'),
    ],
)
def test_administration_over_http_is_shut_without_the_key(toy_server, path, body):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(f"http://localhost:{toy_server.http}/{path}", body), timeout=30)
    assert caught.value.code == 403
    caught.value.close()


def test_the_pip_installed_server_listens_on_this_machine_only(toy_server):
    others = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    for port in (toy_server.http, toy_server.grpc, toy_server.metrics):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        for address in ["127.0.0.2", *others]:
            with pytest.raises(OSError, match=r"refused|unreachable|timed out"):
                socket.create_connection((address, port), timeout=5)


# --- TLS ------------------------------------------------------------------------------------------------


def openssl(folder, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, check=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, and a server's and a client's certificate signed by it."""
    folder = tmp_path_factory.mktemp("certificates")
    openssl(folder, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=ca",
            "-keyout", "ca.key", "-out", "ca.pem")  # fmt: skip
    (folder / "names.txt").write_text("subjectAltName=DNS:localhost", encoding="ascii")
    for name in ("server", "client"):
        openssl(folder, "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
                "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2",
                "-extfile", "names.txt", "-out", f"{name}.pem")  # fmt: skip
    return folder


def test_with_tls_and_a_client_authority_only_clients_with_a_certificate_are_served(toy, tmp_path, certificates):
    settings = {"TLS_CERT": "server.pem", "TLS_KEY": "server.key", "TLS_CLIENT_CA": "ca.pem"}
    environ = {name: str(certificates / file) for name, file in settings.items()}
    server = Server(tmp_path / "log.txt", toy, environ).wait_until_ready()
    authority = str(certificates / "ca.pem")
    own = {"private_key": str(certificates / "client.key"), "certificate_chain": str(certificates / "client.pem")}

    def embed(**tls):
        with triton.InferenceServerClient(server.url, **tls) as client:
            return client.infer(MODEL_NAME, [bytes_input("query", ["x"])], client_timeout=10).as_numpy("embeddings")

    assert embed(ssl=True, root_certificates=authority, **own).shape == (1, 64)
    for stranger in ({}, {"ssl": True, "root_certificates": authority}, {"ssl": True}):
        with pytest.raises(triton.InferenceServerException):
            embed(**stranger)
    assert server.stop() == 0


def test_half_of_a_tls_setting_is_refused(toy, tmp_path):
    server = Server(tmp_path / "log.txt", toy, {"TLS_CERT": "x.pem"})
    assert server.process.wait(60) == 2
    assert "expected both TLS_CERT and TLS_KEY, did not get both" in server.log_text()
