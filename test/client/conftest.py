"""A real server and a real gateway, started once for all tests."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from nv_embed_client import NVEmbedClient

REPO = Path(__file__).resolve().parents[2]
MINI = REPO / "checkpoints" / "nv-embed-mini"
TOY = REPO / "test" / "data" / "toy"
START_SECONDS = 120.0
STOP_SECONDS = 60.0
MAX_SEQUENCE_TOKENS = 512


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    http: int
    grpc: int
    metrics: int

    @property
    def url(self) -> str:
        return f"localhost:{self.grpc}"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def metric(page: str, name: str) -> float:
    """A value of a page of Prometheus metrics; 0 of a counter that has not counted yet."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE)
    return float(found[1]) if found else 0.0


def cancelled_requests(address: Address) -> float:
    """Requests of documents that the server has answered as cancelled."""
    with urllib.request.urlopen(f"http://localhost:{address.metrics}/metrics", timeout=30) as response:
        return metric(response.read().decode(), 'nv_embed_requests_total{kind="documents",outcome="Cancelled"}')


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when `url` answers 200; fail when the process ends before."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    pytest.fail(f"{url} is not ready; exit code {process.poll()}; its log:\n{log.read_text(errors='replace')[-4000:]}")


@contextmanager
def running(command: list[str | Path], ready: str, log: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process from its start until SIGTERM, which it must answer with exit code 0."""
    # The server refuses to start with a variable of its prefix that it does not know.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NV_EMBED_")}
    with log.open("ab") as stream:
        process = subprocess.Popen(command, env={**kept, **settings}, stdout=stream, stderr=subprocess.STDOUT)
    try:
        wait_for(ready, process, log)
        yield process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_SECONDS) == 0, log.read_text(errors="replace")[-4000:]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def serving(
    log: Path, address: Address, checkpoint: Path, *arguments: str, **settings: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The server as a user starts it."""
    with running(
        [REPO / "serve.sh", *arguments],
        f"http://localhost:{address.http}/v2/health/ready",
        log,
        VENV=os.environ.get("NV_EMBED_SERVER_VENV") or os.environ.get("VENV") or str(REPO / ".venv"),
        MODEL_PATH=str(checkpoint),
        DEVICE="cpu",
        RUNTIME="pip",
        HTTP_PORT=str(address.http),
        GRPC_PORT=str(address.grpc),
        METRICS_PORT=str(address.metrics),
        **settings,
    ) as process:
        yield process


@contextmanager
def gateway_running(log: Path, triton_url: str, *arguments: str, **settings: str) -> Iterator[str]:
    """The gateway as a user starts it; gives its base URL."""
    (port,) = free_ports(1)
    base = f"http://127.0.0.1:{port}"
    command = [Path(sys.executable).parent / "nv-embed-gateway", "--triton-url", triton_url]
    with running(
        [*command, "--host", "127.0.0.1", "--port", str(port), *arguments], f"{base}/health/live", log, **settings
    ):
        yield base


@pytest.fixture(scope="session", autouse=True)
def no_proxy() -> None:
    """Everything here is on this machine."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def default_checkpoint() -> bool:
    """Whether the embedded default checkpoint is there; the toy's vectors have no meaning."""
    return (MINI / "model.safetensors").exists()


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def server(logs: Path, no_proxy: None, default_checkpoint: bool) -> Iterator[Address]:
    address = Address(*free_ports(3))
    with serving(
        logs / "server.log",
        address,
        MINI if default_checkpoint else TOY,
        NV_EMBED_MAX_SEQUENCE_TOKENS=str(MAX_SEQUENCE_TOKENS),
        NV_EMBED_MAX_REQUEST_BYTES=str(2**23),
    ):
        yield address


@pytest.fixture(scope="session")
def client(server: Address) -> Iterator[NVEmbedClient]:
    with NVEmbedClient(server.url) as client:
        client.wait_until_ready(60)
        yield client


@pytest.fixture(scope="session")
def gateway(server: Address, logs: Path) -> Iterator[str]:
    with gateway_running(logs / "gateway.log", server.url, "--max-body-bytes", str(2**21)) as base:
        yield base
