"""Does one client keep three servers evenly busy, and does it lose nothing when servers die, stop and join?

    pip install -e client[gateway] trustme
    python benchmarks/several_servers.py

Three servers of this repository's test checkpoint run on 127.0.0.2 to 127.0.0.4, with one port. Sync and async clients
ask all the time. Meanwhile one server is killed with SIGKILL, another one ends by SIGTERM, and both start again. Each
case does that once: with a list of addresses or with a name for all, in the clear or over TLS. With a name, the third
server is only added to the name while the load runs. The name is in a hosts file of this process's own, which needs
`unshare` (util-linux) and a kernel that lets users have namespaces.

Every vector is compared with the one that a single server gave before. Exit code 1: an error, a wrong row, or a server
with less than 0.7 of the requests of the busiest one. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import trustme
from machine import machine
from nv_embed_client import TLS, AsyncNVEmbedClient, NVEmbedClient
from processes import processes_of
from started_server import ROOT, Ports, StartedServer, end_on_sigterm, free_ports, progress

NAME = "nv-embed.test"
ADDRESSES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
CASES = ("list", "list-tls", "name", "name-tls")
LEAST_SHARE = 0.7
WITHIN_SECONDS = 120.0  # for what takes a moment: the machine may be busy with anything
SETTLING_SECONDS = 2.0  # each client finds a server by itself, and the first to find one says nothing about the others
PAUSE_SECONDS = 0.01  # of those who ask queries, so that servers can start meanwhile
TEXTS = [" ".join(["word"] * (1 + number % 40)) + f" {number}" for number in range(64)]
HOSTS_VARIABLE = "SEVERAL_SERVERS_HOSTS"


@dataclass
class Load:
    """Clients that ask without pause, each in a thread of its own, and what came of it."""

    url: str
    tls: TLS | None
    queries: npt.NDArray[np.float32]
    documents: npt.NDArray[np.float32]
    requests: int = 0
    rows: int = 0
    wrong_rows: int = 0
    errors: list[str] = field(default_factory=list)
    longest_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Load:
        self._client = NVEmbedClient(self.url, tls=self.tls)
        asks: list[Callable[[], None]] = [self._ask_queries] * 4 + [self._ask_documents] * 2
        self._threads = [threading.Thread(target=self._repeat, args=(ask,)) for ask in asks]
        self._threads.append(threading.Thread(target=lambda: asyncio.run(self._ask_async())))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    def _repeat(self, ask: Callable[[], None]) -> None:
        while not self._stop.is_set():
            ask()
            if ask == self._ask_queries:
                time.sleep(PAUSE_SECONDS)

    def _ask_queries(self) -> None:
        number = random.randrange(len(TEXTS))
        began = time.monotonic()
        try:
            self._note(self._client.embed_query(TEXTS[number]), self.queries[[number]], began)
        except Exception as error:
            self._failed(error)

    def _ask_documents(self) -> None:
        """One call of several requests."""
        numbers = random.sample(range(len(TEXTS)), 32)
        began = time.monotonic()
        try:
            result = self._client.embed([TEXTS[number] for number in numbers], max_texts_per_request=4)
            self._note(result.embeddings, self.documents[numbers], began)
        except Exception as error:
            self._failed(error)

    async def _ask_async(self) -> None:
        async with AsyncNVEmbedClient(self.url, tls=self.tls) as client:

            async def repeat() -> None:
                while not self._stop.is_set():
                    number = random.randrange(len(TEXTS))
                    began = time.monotonic()
                    try:
                        self._note(await client.embed_query(TEXTS[number]), self.queries[[number]], began)
                    except Exception as error:
                        self._failed(error)
                    await asyncio.sleep(PAUSE_SECONDS)

            await asyncio.gather(*(repeat() for _ in range(4)))

    def _note(self, rows: npt.NDArray[Any], expected: npt.NDArray[np.float32], began: float) -> None:
        seconds = time.monotonic() - began
        wrong = len(rows) if rows.shape != expected.shape else int((np.abs(rows - expected).max(axis=1) > 1e-4).sum())
        with self._lock:
            self.requests += 1
            self.rows += len(expected)
            self.wrong_rows += wrong
            self.longest_seconds = max(self.longest_seconds, seconds)

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self.errors.append(f"{type(error).__name__}: {error}")


class Trio:
    """Three servers on one port."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self._folder, self._settings = (
            folder,
            settings
            | {
                "NV_EMBED_DTYPE": "float32",  # because rows are compared
                "NV_EMBED_CACHE_MEBIBYTES": "0",
                "OMP_NUM_THREADS": "1",
            },
        )
        self.port, *others = free_ports(1 + 2 * len(ADDRESSES))
        self._ports = [Ports(others[2 * n], self.port, others[2 * n + 1]) for n in range(len(ADDRESSES))]
        self.servers: dict[int, StartedServer] = {}

    def start(self, numbers: Iterable[int]) -> None:
        """Start these, and return when all are ready."""
        for number in numbers:
            own = {"ADDRESS": ADDRESSES[number], "METRICS_ADDRESS": "127.0.0.1", "DEVICE": "cpu", "RUNTIME": "pip"}
            self.servers[number] = StartedServer(
                self._folder / f"server-{number}.log",
                {"MODEL_PATH": str(ROOT / "test" / "data" / "toy"), **own, **self._settings},
                arguments=["--http-address=127.0.0.1"],
                ports=self._ports[number],
            )
        for number in numbers:
            self.servers[number].wait_until_ready()
            within(lambda number=number: self._page(number))  # Triton opens the port of the metrics last

    def kill(self, number: int) -> None:
        """End tritonserver with SIGKILL; serve.sh has become it."""
        server = self.servers.pop(number)
        os.kill(processes_of(server.process.pid)["server"], signal.SIGKILL)
        server.process.wait()

    def stop(self, number: int) -> None:
        """End it with SIGTERM; returns when it is gone."""
        self.servers.pop(number).stop()

    def close(self) -> None:
        """End all that run."""
        for server in self.servers.values():
            server.process.terminate()
        for number in list(self.servers):
            self.stop(number)

    def requests(self) -> list[float]:
        """That each has answered since it started."""
        return [self._num_requests(self._page(number) or "") for number in sorted(self.servers)]

    def shares(self, seconds: float) -> list[float]:
        """Requests that each answers in the seconds that follow."""
        before = self.requests()
        time.sleep(seconds)
        return [after - early for after, early in zip(self.requests(), before, strict=True)]

    def seconds_until_busy(self, number: int) -> float:
        """Until this one has answered ten requests of texts."""
        began = time.monotonic()
        within(lambda: self._num_requests(self._page(number) or "") >= 10)
        return time.monotonic() - began

    def _page(self, number: int) -> str | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._ports[number].metrics}/metrics", timeout=30) as page:
                text: str = page.read().decode()
                return text
        except OSError:
            return None

    @staticmethod
    def _num_requests(page: str) -> float:
        lines = (line for line in page.splitlines() if line.startswith("nv_embed_requests_total"))
        return sum(float(line.rpartition(" ")[2]) for line in lines if 'kind="model_info"' not in line)


def within(condition: Callable[[], Any]) -> None:
    """Return once it holds; TimeoutError if it does not within WITHIN_SECONDS."""
    deadline = time.monotonic() + WITHIN_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected it to happen within {WITHIN_SECONDS} s; it did not; see the servers' logs")
        time.sleep(0.02)


def name_stands_for(addresses: Iterable[str]) -> None:
    """Make NAME resolve to these addresses, in this process and its children."""
    lines = ["127.0.0.1 localhost", *(f"{address} {NAME}" for address in addresses)]
    Path(os.environ[HOSTS_VARIABLE]).write_text("\n".join(lines) + "\n", encoding="ascii")


def run(case: str, seconds: float, folder: Path) -> dict[str, Any]:
    """What came of one case."""
    by_name, settings, tls = case.startswith("name"), {}, None
    if case.endswith("-tls"):
        authority = trustme.CA()
        # With the name alone, so that a client that checks for addresses is refused, and the other way round.
        certificate = authority.issue_cert(*([NAME] if by_name else ADDRESSES))
        authority.cert_pem.write_to_path(folder / "ca.pem")
        certificate.private_key_pem.write_to_path(folder / "key.pem")
        certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
        settings = {"TLS_CERT": str(folder / "cert.pem"), "TLS_KEY": str(folder / "key.pem")}
        tls = TLS(folder / "ca.pem")
    trio = Trio(folder, settings)
    url = f"dns:///{NAME}:{trio.port}" if by_name else ",".join(f"{address}:{trio.port}" for address in ADDRESSES)
    progress(f"{case}: {url}")
    result: dict[str, Any] = {"case": case}
    try:
        trio.start(range(3))
        if by_name:
            name_stands_for(ADDRESSES[:2])
        with NVEmbedClient(url, tls=tls) as client:
            client.wait_until_ready(WITHIN_SECONDS)
            queries, documents = client.embed_queries(TEXTS), client.embed_documents(TEXTS)
        with Load(url, tls, queries, documents) as load:
            if by_name:
                time.sleep(seconds / 4)
                name_stands_for(ADDRESSES)
                result["joined_by_name_s"] = round(trio.seconds_until_busy(2), 1)
            time.sleep(0.5)
            result["shares"] = trio.shares(seconds)
            progress(f"{case}: SIGKILL of a server")
            trio.kill(0)
            time.sleep(seconds / 2)
            progress(f"{case}: SIGTERM of another one")
            trio.stop(1)
            time.sleep(seconds / 4)
            trio.start([0, 1])
            result["joined_again_s"] = [round(trio.seconds_until_busy(number), 1) for number in (0, 1)]
            time.sleep(SETTLING_SECONDS)
            result["shares_after"] = trio.shares(seconds)
    finally:
        trio.close()
    result |= {
        "requests": load.requests,
        "rows": load.rows,
        "wrong_rows": load.wrong_rows,
        "errors": len(load.errors),
        "first_errors": load.errors[:3],
        "longest_s": round(load.longest_seconds, 2),
    }
    for name in ("shares", "shares_after"):
        result[f"least_of_{name}"] = round(min(result[name]) / max(max(result[name]), 1), 2)
    result["ok"] = not load.errors and not load.wrong_rows and result["least_of_shares"] >= LEAST_SHARE
    result["ok"] = result["ok"] and result["least_of_shares_after"] >= LEAST_SHARE
    return result


def in_own_hosts(arguments: list[str]) -> None:
    """Become the same process with a hosts file of its own, unless this is that."""
    if HOSTS_VARIABLE in os.environ:
        return
    hosts = tempfile.NamedTemporaryFile("w", prefix="hosts-", delete=False)  # noqa: SIM115 - the next process has it
    hosts.close()
    mount = f'mount --bind "${HOSTS_VARIABLE}" /etc/hosts && exec "$@"'
    os.execvpe(
        "unshare",
        ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", sys.executable, *arguments],
        os.environ | {HOSTS_VARIABLE: hosts.name},
    )


def main() -> int:
    """Run the cases; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", default=",".join(CASES), help="of %(default)s")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default: %(default)s)")
    parsed = parser.parse_args()
    cases = parsed.cases.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"--cases: expected some of {', '.join(CASES)}; got {', '.join(sorted(unknown))}; correct it")
    if any(case.startswith("name") for case in cases):
        in_own_hosts(sys.argv)
    end_on_sigterm()
    results = []
    try:
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                results.append(run(case, parsed.seconds, Path(folder)))
    finally:
        if HOSTS_VARIABLE in os.environ:
            Path(os.environ[HOSTS_VARIABLE]).unlink(missing_ok=True)
    print(f"{'case':<9} {'requests':>8} {'errors':>6} {'wrong':>5} {'longest':>8}  least / largest share, twice")
    for each in results:
        print(
            f"{each['case']:<9} {each['requests']:>8} {each['errors']:>6} {each['wrong_rows']:>5} "
            f"{each['longest_s']:>6} s  {each['least_of_shares']} {each['least_of_shares_after']}"
        )
    print(json.dumps({"machine": machine(), "results": results}))
    return 0 if all(each["ok"] for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
