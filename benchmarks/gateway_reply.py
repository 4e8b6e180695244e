"""How long others wait at the gateway while it answers with 2,048 vectors of 4,096 numbers.

    pip install -e client[gateway]
    python benchmarks/gateway_reply.py

A gateway is started in front of a stand-in for Triton, which answers at once with random vectors, so that nothing but
the gateway computes. One client asks for large replies without pause, in JSON numbers, the slowest to write; two others
ask `/health/live` and for one vector, each ten times a second. Their waits are measured first alone, then beside the
large replies. The clients share this machine with the gateway. The last line is JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import orjson
from machine import machine
from started_server import START_SECONDS, StartedGateway, free_ports
from tritonclient.grpc import service_pb2, service_pb2_grpc

_MAX_MESSAGE_BYTES = 2**31 - 1


class RandomVectors(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # ships no types
    """Triton's answers to the client, with vectors that nobody computed."""

    def __init__(self, dimension: int) -> None:
        self._vectors = np.random.default_rng(1).standard_normal((256, dimension)).astype(np.float32)

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=True)

    def ModelInfer(self, request: Any, context: Any) -> Any:
        num_texts = request.inputs[0].shape[-1]
        reply = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1")
        for name, datatype, array in (
            ("embeddings", "FP32", self._vectors[:num_texts]),
            ("token_counts", "INT32", np.full(num_texts, 8, np.int32)),
            ("is_truncated", "BOOL", np.zeros(num_texts, np.bool_)),
        ):
            reply.outputs.add(name=name, datatype=datatype, shape=array.shape)
            reply.raw_output_contents.append(array.tobytes())
        return reply


def serve(port: int, dimension: int) -> None:
    """Until the process is ended."""
    size = [("grpc.max_send_message_length", _MAX_MESSAGE_BYTES)]
    server = grpc.server(futures.ThreadPoolExecutor(4), options=size)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(RandomVectors(dimension), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


class Asker:
    """One kept-alive connection to the gateway."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def ask(self, path: str, body: bytes | None = None) -> bytes:
        method = "GET" if body is None else "POST"
        self._connection.request(method, path, body, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"expected 200 of the gateway; got {response.status}: {answer[:300]!r}")
        return answer

    def once_it_embeds(self, path: str, body: bytes) -> bytes:
        """The first answer, as soon as the server behind the gateway listens."""
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                return self.ask(path, body)
            except RuntimeError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)


def waits(port: int, path: str, body: bytes | None, until: Callable[[], bool]) -> list[float]:
    """Milliseconds of each of ten requests a second."""
    asker, durations = Asker(port), []
    while not until():
        begin = time.perf_counter()
        asker.ask(path, body)
        durations.append(1000 * (time.perf_counter() - begin))
        time.sleep(0.1)
    return durations


def measured(port: int, until: Callable[[], bool]) -> dict[str, list[float]]:
    """The waits of both small requests, each from a thread of its own."""
    one_text = orjson.dumps({"input": "a text"})
    kinds: dict[str, tuple[str, bytes | None]] = {
        "/health/live": ("/health/live", None),
        "one vector": ("/v1/embeddings", one_text),
    }
    with futures.ThreadPoolExecutor(len(kinds)) as pool:
        pending = {name: pool.submit(waits, port, *kind, until) for name, kind in kinds.items()}
        return {name: each.result() for name, each in pending.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2048, help="of a large request")
    parser.add_argument("--dimension", type=int, default=4096)
    parser.add_argument("--replies", type=int, default=10, help="large replies to measure beside")
    arguments = parser.parse_args()

    (triton,) = free_ports(1)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(triton, arguments.dimension), daemon=True)
    server.start()
    max_inputs = ("--max-inputs", str(arguments.texts))
    with (
        tempfile.TemporaryDirectory() as folder,
        StartedGateway(Path(folder, "gateway.log"), f"127.0.0.1:{triton}", max_inputs) as gateway,
    ):
        large = orjson.dumps({"input": ["a text"] * arguments.texts})
        asker = Asker(gateway.port)
        num_bytes = len(asker.once_it_embeds("/v1/embeddings", large))

        idle_until = time.perf_counter() + 3
        alone = measured(gateway.port, lambda: time.perf_counter() > idle_until)
        done = threading.Event()
        with futures.ThreadPoolExecutor(1) as pool:
            pending = pool.submit(measured, gateway.port, done.is_set)
            seconds = []
            for _ in range(arguments.replies):
                begin = time.perf_counter()
                asker.ask("/v1/embeddings", large)
                seconds.append(time.perf_counter() - begin)
            done.set()
            beside = pending.result()
    server.terminate()
    server.join()

    reply_seconds = statistics.median(seconds)
    print(
        f"{arguments.texts} vectors of {arguments.dimension} numbers are {num_bytes / 1e6:.0f} MB and take "
        f"{reply_seconds:.2f} s; waits in milliseconds"
    )
    print(f"{'':14} {'alone: median':>14} {'longest':>8} {'beside: median':>15} {'longest':>8}")
    for name in alone:
        values = [statistics.median(alone[name]), max(alone[name]), statistics.median(beside[name]), max(beside[name])]
        print(f"{name:14} {values[0]:14.1f} {values[1]:8.1f} {values[2]:15.1f} {values[3]:8.1f}")
    print(
        json.dumps(
            {
                "benchmark": "gateway_reply",
                "texts": arguments.texts,
                "dimension": arguments.dimension,
                "megabytes": round(num_bytes / 1e6, 1),
                "reply_seconds": round(reply_seconds, 3),
                "longest_wait_ms": {name: round(max(each), 1) for name, each in beside.items()},
                "median_wait_ms": {name: round(statistics.median(each), 1) for name, each in beside.items()},
                "median_wait_ms_alone": {name: round(statistics.median(each), 1) for name, each in alone.items()},
                "machine": machine(),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
