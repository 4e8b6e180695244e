"""What the OpenAI-style gateway costs: texts per second through it, and through the gRPC client, of one server.

    pip install -e client[gateway]
    python benchmarks/gateway.py --url localhost:8001

Sixteen clients each send a batch of 32 texts and, when it is answered, the next. A gRPC client is `NVEmbedClient`; a
gateway client is a kept-alive HTTP connection that asks for base64, as the `openai` package does, and decodes it to
an array, so both end with float32 [32, dim]. The gateway is started here, in front of the same server. Rounds of the
two alternate, in turned order every second round; ratios are taken within a round. All texts are drawn from a seed
and none comes twice, so no cache helps. The clients share this machine with the gateway (and the server, if it runs
here): with few cores that counts against the gateway, whose clients parse more. The last line is JSON.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import orjson
from nv_embed_client import NVEmbedClient

Embed: TypeAlias = Callable[[list[str]], npt.NDArray[np.float32]]
WORDS = (
    "water",
    "light",
    "metal",
    "paper",
    "river",
    "engine",
    "garden",
    "letter",
    "window",
    "market",
    "doctor",
    "planet",
)


class Texts:
    """Texts that never repeat, of some 40 words; safe for many threads."""

    def __init__(self) -> None:
        self._random = Random(1)
        self._number = count()
        self._lock = threading.Lock()

    def batch(self, size: int) -> list[str]:
        with self._lock:
            return [
                f"{next(self._number)} {' '.join(self._random.choices(WORDS, k=self._random.randint(20, 60)))}"
                for _ in range(size)
            ]


@dataclass(frozen=True)
class Round:
    """One load on one target."""

    texts_per_second: float
    median_ms: float
    p95_ms: float


def run_round(clients: Sequence[Embed], texts: Texts, batch: int, seconds: float) -> Round:
    """Every client in a closed loop for so long; what is begun is finished and counted, and so is its time."""
    durations: list[float] = []
    errors: list[BaseException] = []
    start = time.perf_counter()

    def work(embed: Embed) -> None:
        try:
            while not errors and time.perf_counter() < start + seconds:
                sent = texts.batch(batch)
                begin = time.perf_counter()
                rows = embed(sent)
                durations.append(time.perf_counter() - begin)
                if len(rows) != batch or rows.dtype != np.float32:
                    raise RuntimeError(f"expected float32 [{batch}, dim]; got {rows.dtype} {rows.shape}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(embed,)) for embed in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    elapsed = time.perf_counter() - start
    ordered = sorted(durations)
    return Round(
        texts_per_second=len(ordered) * batch / elapsed,
        median_ms=1000 * statistics.median(ordered),
        p95_ms=1000 * ordered[int(0.95 * (len(ordered) - 1))],
    )


class HTTPClient:
    """One connection to the gateway."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def __call__(self, texts: list[str]) -> npt.NDArray[np.float32]:
        body = orjson.dumps({"model": "nv-embed-v2", "input": texts, "encoding_format": "base64"})
        self._connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"expected 200 of the gateway; got {response.status}: {answer[:300]!r}")
        rows = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in orjson.loads(answer)["data"]]
        return np.stack(rows).astype(np.float32, copy=False)

    def close(self) -> None:
        self._connection.close()


@contextmanager
def gateway(triton_url: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A gateway on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "nv_embed_client.gateway", "--triton-url", triton_url, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=10):
                    break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(
                        f"expected a gateway that is ready; got none; run: {' '.join(command)}"
                    ) from None
                time.sleep(0.1)
        yield port, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def cpu_seconds(pid: int) -> float | None:
    """What a process has computed so far; None where /proc does not say."""
    path = Path(f"/proc/{pid}/stat")
    if not path.exists():
        return None
    fields = path.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="localhost:8001", help="Triton's gRPC address")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32, help="texts in one request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each round and target")
    arguments = parser.parse_args()

    texts = Texts()
    rounds: dict[str, list[Round]] = {"gRPC client": [], "gateway": []}
    gateway_cpu, gateway_texts = 0.0, 0.0
    with gateway(arguments.url) as (port, process):
        grpc_clients = [NVEmbedClient(arguments.url) for _ in range(arguments.clients)]
        http_clients = [HTTPClient(port) for _ in range(arguments.clients)]
        targets: dict[str, Sequence[Embed]] = {
            "gRPC client": [client.embed_documents for client in grpc_clients],
            "gateway": http_clients,
        }
        for clients in targets.values():  # connections, threads and the server's first batches
            run_round(clients, texts, arguments.batch, min(2.0, arguments.seconds))
        for number in range(arguments.rounds):
            for name in list(targets)[:: 1 if number % 2 == 0 else -1]:
                before = cpu_seconds(process.pid)
                begin = time.perf_counter()
                result = run_round(targets[name], texts, arguments.batch, arguments.seconds)
                elapsed = time.perf_counter() - begin
                after = cpu_seconds(process.pid)
                rounds[name].append(result)
                if name == "gateway" and before is not None and after is not None:
                    gateway_cpu += after - before
                    gateway_texts += result.texts_per_second * elapsed
                print(f"round {number + 1}: {name:12} {result.texts_per_second:8.0f} texts/s", file=sys.stderr)
        dimension = grpc_clients[0].dimension()
        for grpc_client, http_client in zip(grpc_clients, http_clients, strict=True):
            grpc_client.close()
            http_client.close()

    pairs = zip(rounds["gateway"], rounds["gRPC client"], strict=True)
    ratios = [through.texts_per_second / direct.texts_per_second for through, direct in pairs]
    cpu_ms = 1000 * gateway_cpu * arguments.batch / gateway_texts if gateway_texts else None

    def median(name: str, field: str) -> float:
        return float(statistics.median(getattr(each, field) for each in rounds[name]))

    print(f"{arguments.clients} clients, batches of {arguments.batch}, {dimension} dimensions, medians of rounds")
    print(f"{'':12} {'texts/s':>9} {'median ms':>10} {'p95 ms':>8}")
    for name in rounds:
        values = [median(name, field) for field in ("texts_per_second", "median_ms", "p95_ms")]
        print(f"{name:12} {values[0]:9.0f} {values[1]:10.1f} {values[2]:8.1f}")
    print(f"gateway / gRPC client: {statistics.median(ratios):.2f} (rounds: {min(ratios):.2f} to {max(ratios):.2f})")
    if cpu_ms is not None:
        print(f"the gateway computes {cpu_ms:.2f} ms for a batch")
    print(
        json.dumps(
            {
                "benchmark": "gateway",
                "clients": arguments.clients,
                "batch": arguments.batch,
                "dimension": dimension,
                "rounds": arguments.rounds,
                "seconds": arguments.seconds,
                "machine": {"cpus": os.cpu_count(), "architecture": platform.machine()},
                "grpc_texts_per_second": round(median("gRPC client", "texts_per_second"), 1),
                "gateway_texts_per_second": round(median("gateway", "texts_per_second"), 1),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "gateway_cpu_ms_per_batch": None if cpu_ms is None else round(cpu_ms, 2),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
