"""Servers that a benchmark starts itself, through serve.sh. Knows nothing of what they are asked."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 600
STOP_SECONDS = 60


def free_ports(count: int) -> list[int]:
    """Different ports of this machine that nothing listens on."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


@dataclass(frozen=True, slots=True)
class Ports:
    """Of one server."""

    http: int
    grpc: int
    metrics: int


def is_ready(http_port: int) -> bool:
    """Whether the server there says that it is ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/v2/health/ready", timeout=2):
            return True
    except OSError:
        return False


@contextmanager
def started_server(settings: Mapping[str, str], log: Path) -> Iterator[tuple[subprocess.Popen[bytes], Ports]]:
    """`serve.sh` on free ports, ready; stopped at the end."""
    ports = Ports(*free_ports(3))
    # By pip: the baseline's packages are in that environment and in no image.
    environ = (
        {"RUNTIME": "pip"}
        | os.environ
        | {
            "HTTP_PORT": str(ports.http),
            "GRPC_PORT": str(ports.grpc),
            "METRICS_PORT": str(ports.metrics),
        }
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            [ROOT / "serve.sh"], env=environ | dict(settings), stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(ports.http):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
                raise SystemExit(f"{tail}\nthe server did not become ready; its log is above")
            time.sleep(0.2)
        yield process, ports
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def batch_tokens_of(log: Path) -> int | None:
    """The budget that a server of this repository settled on, from its log."""
    found = re.findall(r"max_batch_tokens=(\d+)", log.read_text(encoding="utf-8", errors="replace"))
    return int(found[-1]) if found else None


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does: what it started is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def progress(message: str) -> None:
    """Say what goes on, apart from the results."""
    print(message, file=sys.stderr, flush=True)
