"""What strangers may do: read the configuration and ping, but no administration; and what TLS lets nobody do."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from contextlib import suppress

import numpy as np
import pytest
import tritonclient.grpc as triton
from pytriton.client import ModelClient
from serving import MODEL_NAME, Server, bytes_input, eventually, free_ports

pytestmark = pytest.mark.server
ADMINISTRATION = {
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


@pytest.mark.filterwarnings("ignore:tritonclient.grpc doesn't support timeout")
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_pytritons_client_reads_the_configuration_and_embeds(toy_server, protocol):
    port = {"grpc": toy_server.grpc, "http": toy_server.http}[protocol]
    with ModelClient(f"{protocol}://localhost:{port}", MODEL_NAME, lazy_init=False, init_timeout_s=60) as client:
        assert [tensor.name for tensor in client.model_config.inputs] == ["query", "documents"]
        row = client.infer_sample(query=np.array([b"x"], dtype=np.object_))["embeddings"]
    np.testing.assert_allclose(row, toy_server.embed_query("x"), atol=1e-5)


def test_the_configuration_shows_defaults_and_nothing_of_this_server(toy_server, toy):
    assert str(toy) not in str(toy_server.client.get_model_config(MODEL_NAME))


def test_arguments_shut_the_configuration_too(toy, tmp_path, start):
    protocols = "metadata,model-config:nv-embed-admin=sesame"
    arguments = [f"--grpc-restricted-protocol={protocols}", f"--http-restricted-api={protocols}"]
    server = start(tmp_path / "log.txt", toy, {"ADMIN_KEY": "sesame"}, arguments)
    for read in (server.client.get_model_config, server.client.get_model_metadata):
        with pytest.raises(triton.InferenceServerException, match="restricted"):
            read(MODEL_NAME)
        assert MODEL_NAME in str(read(MODEL_NAME, headers={"triton-grpc-protocol-nv-embed-admin": "sesame"}))
    with pytest.raises(urllib.error.HTTPError, match="403") as caught:
        urllib.request.urlopen(f"http://localhost:{server.http}/v2/models/{MODEL_NAME}/config", timeout=60)
    caught.value.close()
    assert server.embed_query("x").shape == (1, 64)
    assert server.stop() == 0


def test_a_client_may_ping_often_and_keeps_its_connection(toy_server):
    """By default Triton ends a connection, and what it carries, at the third ping within five minutes."""
    pings = triton.KeepAliveOptions(
        keepalive_time_ms=100,
        keepalive_timeout_ms=60_000,
        keepalive_permit_without_calls=True,
        http2_max_pings_without_data=0,
    )
    with Relay(toy_server.grpc) as relay:
        with triton.InferenceServerClient(f"127.0.0.1:{relay.port}", keepalive_options=pings) as client:
            assert client.is_server_live()
            sent = relay.num_bytes
            # A ping has 17 bytes; without a call nothing else is sent, but answers to the server's own pings.
            eventually(lambda: relay.num_bytes > sent + 20 * 17)
            assert client.infer(MODEL_NAME, [bytes_input("query", ["x"])]).as_numpy("embeddings").shape == (1, 64)
        assert relay.num_connections == 1


def test_the_pip_installed_server_listens_on_this_machine_only(toy_server):
    others = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    for port in (toy_server.http, toy_server.grpc, toy_server.metrics):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        for address in ["127.0.0.2", *others]:
            with pytest.raises(OSError, match=r"refused|unreachable|timed out"):
                socket.create_connection((address, port), timeout=5)


class Relay:
    """Passes connections on to a port of this machine, and counts them and what their clients send."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.num_bytes = self.num_connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # the end
                return
            self.num_connections += 1
            server = socket.create_connection(("127.0.0.1", self._target))
            threading.Thread(target=self._pass_on, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(server, client, False), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, is_client: bool) -> None:
        with source, suppress(OSError):
            while data := source.recv(2**16):
                if is_client:
                    self.num_bytes += len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


# --- TLS ------------------------------------------------------------------------------------------------


def openssl(folder, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, check=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, and a server's and a client's certificate signed by it, in a folder whose name needs quotes."""
    folder = tmp_path_factory.mktemp("it's [ü] certificates; $HOME")
    openssl(folder, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=ca",
            "-keyout", "ca.key", "-out", "ca.pem")  # fmt: skip
    (folder / "names.txt").write_text("subjectAltName=DNS:localhost", encoding="ascii")
    for name in ("server", "client"):
        openssl(folder, "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
                "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2",
                "-extfile", "names.txt", "-out", f"{name}.pem")  # fmt: skip
    return folder


def test_with_tls_and_a_client_authority_only_clients_with_a_certificate_are_served(
    toy, tmp_path, certificates, gateway_venv, start
):
    settings = {"TLS_CERT": "server.pem", "TLS_KEY": "server.key", "TLS_CLIENT_CA": "ca.pem"}
    environ = {name: str(certificates / file) for name, file in settings.items()}
    (port,) = free_ports(1)
    environ |= {"GATEWAY_PORT": str(port), "GATEWAY_VENV": str(gateway_venv)}
    arguments = {"--triton-certificate-chain": "client.pem", "--triton-private-key": "client.key"}
    environ["GATEWAY_ARGUMENTS"] = shlex.join(
        word for name, file in arguments.items() for word in (name, str(certificates / file))
    )
    server = start(tmp_path / "log.txt", toy, environ)
    authority = str(certificates / "ca.pem")
    own = {"private_key": str(certificates / "client.key"), "certificate_chain": str(certificates / "client.pem")}

    def embed(**tls):
        with triton.InferenceServerClient(server.url, **tls) as client:
            return client.infer(MODEL_NAME, [bytes_input("query", ["x"])], client_timeout=10).as_numpy("embeddings")

    assert embed(ssl=True, root_certificates=authority, **own).shape == (1, 64)
    for stranger in ({}, {"ssl": True, "root_certificates": authority}, {"ssl": True}):
        with pytest.raises(triton.InferenceServerException):
            embed(**stranger)

    def embed_through_the_gateway() -> bool:  # it shows its certificate, and trusts the server's own
        body = json.dumps({"model": MODEL_NAME, "input": "x"}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/embeddings", body, {"content-type": "application/json"}
        )
        with suppress(OSError), urllib.request.urlopen(request, timeout=60) as response:
            return len(json.load(response)["data"][0]["embedding"]) == 64
        return False

    eventually(embed_through_the_gateway)
    assert server.stop() == 0


def test_half_of_a_tls_setting_is_refused(toy, tmp_path):
    server = Server(tmp_path / "log.txt", toy, {"TLS_CERT": "x.pem"})
    assert server.process.wait(60) == 2
    assert "expected both TLS_CERT and TLS_KEY, did not get both" in server.log_text()
