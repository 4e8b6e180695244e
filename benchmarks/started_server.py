"""Processes that serve, from their start to their stop; the benchmarks and both test suites start theirs here.

Standard library only, because the server's environment and the client's both import it.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 600  # the machine may be busy with anything
STOP_SECONDS = 120
FIRST_PORT = 10_000
GATEWAY_COMMAND = Path(sys.executable).parent / "nv-embed-gateway"  # of the environment that runs this
AnyStarted = TypeVar("AnyStarted", bound="Started")


def free_ports(count: int) -> list[int]:
    """Different ports of this machine that nothing listens on, and that no other process finds here meanwhile.

    A port stays reserved until this process ends. They lie below the ports that the kernel gives to outgoing
    connections, so none of those takes one before a server listens on it.
    """
    (lowest_of_kernel, _) = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()
    end = int(lowest_of_kernel) if int(lowest_of_kernel) > FIRST_PORT + 1000 else 65536
    candidates = random.SystemRandom().sample(range(FIRST_PORT, end), end - FIRST_PORT)
    ports: list[int] = []
    while len(ports) < count:
        if not candidates:
            raise OSError(
                f"expected {count} free ports from {FIRST_PORT} to {end - 1}; got {len(ports)}; stop a server"
            )
        port = candidates.pop()
        if _reserve(port):
            ports.append(port)
    return ports


def _reserve(port: int) -> bool:
    """Whether this process now has the port for itself."""
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(f"\0nv-embed port {port}")  # an abstract name: no file, gone with the process that has it
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
    except OSError:
        name.close()
        return False
    name.detach()  # stays open until this process ends
    return True


@dataclass(frozen=True, slots=True)
class Ports:
    """Of one server."""

    http: int
    grpc: int
    metrics: int

    @property
    def url(self) -> str:
        return f"localhost:{self.grpc}"


def answers(url: str) -> bool:
    """Whether that page is there, with a status of success."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


class Started:
    """A process that says over HTTP when it is ready. As a context: ready when entered, stopped when left."""

    def __init__(
        self,
        command: Sequence[str | Path],
        ready: str,
        log: Path,
        environ: Mapping[str, str],
        cwd: Path | None = None,
    ) -> None:
        """Start, without waiting.

        Args:
            command: what to run.
            ready: URL of a page that is there once the process serves.
            log: takes all that it prints, after what is there.
            environ: its whole environment.
            cwd: the folder to run it in; none: this process's.
        """
        self.log, self._ready = log, ready
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ,
                cwd=cwd,
                start_new_session=True,  # so that it can be killed with all that it started
            )

    def answers(self) -> bool:
        """Whether it says that it is ready."""
        return answers(self._ready)

    def wait_until_ready(self: AnyStarted) -> AnyStarted:
        """Return when it is ready.

        Raises:
            RuntimeError: it ended before, or took longer than START_SECONDS and is killed.
        """
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            if self.answers():
                return self
            time.sleep(0.1)
        code = self.process.poll()
        self._kill()
        how = f"none in {START_SECONDS} s" if code is None else f"exit code {code}"
        raise RuntimeError(f"{self.log_text()[-4000:]}\nexpected {self._ready} to answer; got {how}; its log is above")

    def stop(self, with_signal: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop, if it still runs; returns the exit code, -9 of one that had to be killed."""
        self.process.send_signal(with_signal)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return self._kill()

    def _kill(self) -> int:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def __enter__(self: AnyStarted) -> AnyStarted:
        try:
            return self.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()


class StartedServer(Started):
    """`serve.sh`, with the pip-installed Triton."""

    def __init__(
        self,
        log: Path,
        settings: Mapping[str, str],
        *,
        environ: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        ports: Ports | None = None,
        command: Sequence[str | Path] = (ROOT / "serve.sh",),
        cwd: Path | None = None,
    ) -> None:
        """Start, without waiting.

        Args:
            log: takes all that it prints.
            settings: of serve.sh and of the model; they win over `environ`.
            environ: what else is in its environment; none: that of this process.
            arguments: for tritonserver.
            ports: where it listens; none: free ones.
            command: what starts it.
            cwd: the folder to run that in; none: this process's.
        """
        self.ports = ports or Ports(*free_ports(3))
        listen = {f"{name.upper()}_PORT": str(getattr(self.ports, name)) for name in ("http", "grpc", "metrics")}
        super().__init__(
            [*command, *arguments],
            f"http://127.0.0.1:{self.ports.http}/v2/health/ready",
            log,
            {"RUNTIME": "pip"} | dict(os.environ if environ is None else environ) | listen | dict(settings),
            cwd,
        )


class StartedGateway(Started):
    """The client's gateway in front of a server; needs the client and its extra `gateway` in this environment."""

    def __init__(
        self, log: Path, triton_url: str, arguments: Sequence[str] = (), environ: Mapping[str, str] | None = None
    ) -> None:
        """Start it on a free port of this machine, without waiting; `environ`: all of it, or that of this process."""
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        listen = ["--host", "127.0.0.1", "--port", str(self.port)]
        command = [GATEWAY_COMMAND, "--triton-url", triton_url, *listen, *arguments]
        super().__init__(command, f"{self.url}/health/live", log, os.environ if environ is None else environ)


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
