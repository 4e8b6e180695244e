"""A real server and a real gateway, started once for all tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from nv_embed_client import NVEmbedClient
from serving import ROOT as REPO
from serving import SETTINGS, Server, mark_those_with_servers, metrics_of
from serving import Ports as Address
from serving import eventually as eventually
from started_server import AnyStarted, Started, StartedGateway, free_ports

if TYPE_CHECKING:  # the environments of the recipes have no Playwright
    from playwright.sync_api import Browser, Page

MINI = REPO / "checkpoints" / "nv-embed-mini"
TOY = REPO / "test" / "data" / "toy"
MAX_SEQUENCE_TOKENS = 512


def metric(page: str, name: str) -> float:
    """A value of a page of Prometheus metrics; 0 of a counter that has not counted yet."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE)
    return float(found[1]) if found else 0.0


def cancelled_requests(address: Address) -> float:
    """Requests of documents that the server has answered as cancelled."""
    return metrics_of(address.metrics)['nv_embed_requests_total{kind="documents",outcome="Cancelled"}']


def is_computing(address: Address) -> bool:
    """Whether tokens wait on the server while it computes others."""
    return metrics_of(address.metrics)["nv_embed_queue_tokens"] > 0


def without_settings() -> dict[str, str]:
    """This process's environment without what the server's or the gateway's settings could be."""
    return {name: value for name, value in os.environ.items() if not name.startswith((*SETTINGS, "GATEWAY_"))}


@contextmanager
def until_sigterm(started: AnyStarted) -> Iterator[AnyStarted]:
    """Ready, until SIGTERM, which it must answer with exit code 0."""
    with started:
        yield started
        assert started.stop() == 0, started.log_text()[-4000:]


@contextmanager
def running(command: list[str | Path], ready: str, log: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """Any process that serves; `ready`: a URL that answers once it does."""
    with until_sigterm(Started(command, ready, log, without_settings() | settings)) as started:
        yield started.process


@contextmanager
def serving(
    log: Path, address: Address, checkpoint: Path, *arguments: str, **settings: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The server as a user starts it."""
    venv = os.environ.get("NV_EMBED_SERVER_VENV") or os.environ.get("VENV") or str(REPO / ".venv")
    with until_sigterm(Server(log, checkpoint, {"VENV": venv, **settings}, arguments, address)) as server:
        yield server.process


@contextmanager
def gateway_running(log: Path, triton_url: str, *arguments: str, **settings: str) -> Iterator[str]:
    """The gateway as a user starts it; gives its base URL."""
    with until_sigterm(StartedGateway(log, triton_url, arguments, without_settings() | settings)) as gateway:
        yield gateway.url


@contextmanager
def gateway_client(log: Path, triton_url: str, *arguments: str, **settings: str) -> Iterator[httpx.Client]:
    """HTTP to a gateway of its own."""
    with (
        gateway_running(log, triton_url, *arguments, **settings) as base,
        httpx.Client(base_url=base, timeout=60, trust_env=False) as http,
    ):
        yield http


def pytest_configure() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: fixtures stop what they started


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    mark_those_with_servers(items, "running", "serving", "gateway_running", "gateway_client")


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


@pytest.fixture(scope="module")
def http(gateway: str) -> Iterator[httpx.Client]:
    """To the gateway, which a module may have of its own."""
    with httpx.Client(base_url=gateway, timeout=30, trust_env=False) as http:
        yield http


@pytest.fixture(scope="module")  # while Playwright runs, no test of this thread can run an event loop of its own
def browser() -> Iterator[Browser]:
    """A real Chromium; without one the test is skipped."""
    from chromium import NoChromium, chromium

    with ExitStack() as stack:
        try:
            browser = stack.enter_context(chromium())
        except NoChromium as error:
            pytest.skip(str(error))
        yield browser


@pytest.fixture
def page(browser: Browser, gateway: str) -> Iterator[Page]:
    """The gateway's page, once the server is ready."""
    from page_use import opened
    from playwright.sync_api import expect

    with opened(browser, gateway + "/") as page:
        expect(page.locator("#state")).to_have_text("ready")
        yield page
