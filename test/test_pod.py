"""What the chart renders, run: the image's command with the pod's variables, volumes, user and probes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny_models
import tritonclient.grpc as triton
from chart import one, pod_of, render
from pod import Pod, ServerPod, lay_out
from serving import MODEL_NAME, ROOT, Started, bytes_input, eventually, free_ports

pytestmark = pytest.mark.server
HOST = "nv-embed-headless.search.svc"
PROBES = ("startup", "readiness", "liveness")


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    return lay_out(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def start_pod(image, tmp_path_factory):
    """Starts the server's pod of a release; all are stopped at the end."""
    started = []

    def start_pod(values, **volumes) -> ServerPod:
        started.append(ServerPod(pod_of(render(values)), image, tmp_path_factory.mktemp("pod"), volumes))
        return started[-1]

    yield start_pod
    running = [server for server in started if server.process.poll() is None]
    for server in running:
        server.process.terminate()  # all at once, because each takes seconds
    for server in running:
        server.stop()


@pytest.fixture(scope="module")
def default_server(start_pod):
    """What `helm install` without values serves."""
    server = start_pod({})
    assert not server.pod.probe("startup")  # it loads
    return server.wait_until_ready()


def test_the_probes_succeed_once_the_small_checkpoint_is_served(default_server):
    assert [default_server.pod.probe(kind) for kind in PROBES] == [True] * 3
    assert default_server.embed_query("x").shape == (1, 384)


def test_server_and_model_run_as_the_unprivileged_user_and_write_to_volumes_only(default_server):
    pid = default_server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()
    assert children
    for each in (str(pid), *children):
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{each}/status").read_text("ascii").splitlines())
        assert os.geteuid() != 0 or set(status["Uid"].split()) == {"1000"}
    mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text("utf-8").splitlines()]
    options = {fields[4]: fields[5].split(",") for fields in mounts}
    writable = {
        mount["mountPath"] for mount in default_server.pod.container["volumeMounts"] if not mount.get("readOnly")
    }
    assert {
        path for path in ("/", "/opt/nv-embed", "/model_repository", "/usr", *writable) if "rw" in options[path]
    } == writable


def test_another_kind_of_model_is_served_under_its_name_from_a_read_only_image(start_pod, tmp_path):
    tiny_models.make("static", tmp_path)
    values = {"modelName": "tiny", "weights": {"claim": "models", "path": "model"}}
    server = start_pod(values, weights=tmp_path).wait_until_ready()
    assert server.infer(query=["water"], model="tiny")["embeddings"].shape[0] == 1
    assert server.pod.probe("readiness")


# --- TLS, the gateway and the chart's own test ------------------------------------------------------------


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, check=True)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory) -> dict[str, Path]:
    """Secrets of the type kubernetes.io/tls as folders: the server's and a client's, of one authority."""
    folder = tmp_path_factory.mktemp("secrets")
    openssl(folder, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=ca",
            "-keyout", "ca.key", "-out", "ca.crt")  # fmt: skip
    (folder / "names.txt").write_text(f"subjectAltName=DNS:{HOST}", encoding="ascii")
    for name in ("server", "client"):
        (folder / name).mkdir()
        openssl(folder, "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
                "-keyout", f"{name}/tls.key", "-out", "request")  # fmt: skip
        openssl(folder, "x509", "-req", "-in", "request", "-CA", "ca.crt", "-CAkey", "ca.key", "-days", "2",
                "-extfile", "names.txt", "-out", f"{name}/tls.crt")  # fmt: skip
        (folder / name / "ca.crt").write_bytes((folder / "ca.crt").read_bytes())
        for file in (folder / name).iterdir():
            file.chmod(0o644)  # Kubernetes gives the file to the pod's group
    return {"server": folder / "server", "client": folder / "client"}


TLS = {"tls": {"secret": "server", "demandClientCertificates": True, "clientSecret": "client"}}
SECURED = TLS | {"gateway": {"enabled": True}, "weights": {"claim": "weights", "path": "nv-embed-mini"}}


@pytest.fixture(scope="module")
def secured_server(start_pod, secrets):
    """Behind mutual TLS, with weights of a claim."""
    return start_pod(SECURED, weights=ROOT / "checkpoints", tls=secrets["server"]).wait_until_ready()


def test_behind_mutual_tls_the_probes_succeed_and_only_clients_with_a_certificate_are_served(secured_server, secrets):
    assert [secured_server.pod.probe(kind) for kind in PROBES] == [True] * 3
    own = {"private_key": str(secrets["client"] / "tls.key"), "certificate_chain": str(secrets["client"] / "tls.crt")}
    trusted = {"ssl": True, "root_certificates": str(secrets["client"] / "ca.crt")}

    def embed(**tls):
        named = [("grpc.ssl_target_name_override", HOST)]
        with triton.InferenceServerClient(secured_server.url, channel_args=named, **tls) as client:
            return client.infer(MODEL_NAME, [bytes_input("query", ["x"])], client_timeout=60).as_numpy("embeddings")

    assert embed(**trusted, **own).shape == (1, 384)
    for stranger in ({}, trusted):
        with pytest.raises(triton.InferenceServerException):
            embed(**stranger)


@pytest.fixture
def client_pod(image, tmp_path, secrets, gateway_venv, secured_server):
    """Gives the command of a pod that asks the secured server, and the pod. Names are found as in the cluster."""
    trusted = tmp_path / "client-tls"
    trusted.mkdir()
    for file in secrets["client"].iterdir():
        (trusted / file.name).write_bytes(file.read_bytes())
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {HOST}\n", encoding="ascii")
    (port,) = free_ports(1)

    def client_pod(spec):
        pod = Pod(spec, image, tmp_path, {"client-tls": trusted}, secured_server.inside | {9000: port})
        mounts = {"/etc/hosts": hosts, "/opt/nv-embed/.venv-gateway": gateway_venv}
        # In the image, the client is installed.
        return pod, pod.command({"PYTHONPATH": "/opt/nv-embed/client/src"}, mounts), port

    return client_pod


def test_the_gateway_of_the_chart_embeds_and_its_probes_succeed(client_pod, tmp_path):
    pod, command, port = client_pod(pod_of(render(SECURED), "nv-embed-gateway"))
    with Started(command, f"http://127.0.0.1:{port}/health/live", tmp_path / "log.txt", {}) as gateway:
        eventually(lambda: pod.probe("readiness"))
        assert pod.probe("liveness"), gateway.log_text()
        body = json.dumps({"input": "x"}).encode()
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/embeddings", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as response:
            assert len(json.load(response)["data"][0]["embedding"]) == 384


def test_helm_test_embeds_and_ranks(client_pod):
    _, command, _ = client_pod(one(render(SECURED), "Pod", "nv-embed-embed")["spec"])
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180, env={})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Bread rises" in done.stdout


# --- the end ----------------------------------------------------------------------------------------------


def test_a_pod_that_is_deleted_under_load_loses_no_request(start_pod):
    """Requests come until the cluster has noticed, within the pause; the last one takes longer than that."""
    values = {"preStopSeconds": 4, "settings": {"cache_mebibytes": 0}}
    server = start_pod(values).wait_until_ready()
    has_left = threading.Event()
    text = "Yeast in the dough gives off gas, so that the bread rises while it rests. "

    def embed(name: str, count: int) -> int:
        with triton.InferenceServerClient(server.url) as client:  # a new connection, which a Service could balance
            documents = bytes_input("documents", [f"{name} {number} {text}" for number in range(count)])
            return len(client.infer(MODEL_NAME, [documents]).as_numpy("embeddings"))

    def ask(name: str) -> list[int]:
        answered = []
        while not has_left.is_set():
            answered.append(embed(f"{name} {len(answered)}", 32))
        return answered

    def ask_last(seconds: float) -> int:
        per_second = max(map(int, re.findall(r"cpu: (\d+) tokens/s", server.log_text()))) / 20
        has_left.wait()
        return embed("last", int(seconds * per_second))

    with ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(ask, name) for name in "abcd"]
        last = pool.submit(ask_last, 6)
        eventually(lambda: server.metrics_now()["nv_embed_queue_tokens"] > 0)
        noticed = threading.Timer(3, has_left.set)
        noticed.start()
        code, seconds = server.delete()
        for future in asked:
            assert set(future.result()) == {32}
        assert last.result() > 32
    assert code == 0, server.log_text()
    assert seconds < server.pod.spec["terminationGracePeriodSeconds"]
    assert "requests not yet answered: 1" in server.log_text()  # so it was not over before SIGTERM
