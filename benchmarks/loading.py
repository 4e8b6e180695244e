"""How fast a checkpoint of the published layout comes from the page cache to the device, and what it takes of the host.

    python benchmarks/loading.py                                   # 15.7 GB, to the GPU
    python benchmarks/loading.py --device cpu --layers 4           # 3.5 GB, anywhere

The checkpoint is synthetic: the published names, shapes, precision and four shards, all zeros, in sparse files that
take no room on the disk. They are read once before, so that the page cache has them as after a first start. Beside it,
what a plain copy of the same bytes from the page cache takes, and on a GPU what the bus does from pinned memory. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from machine import machine
from started_server import ROOT

sys.path.insert(0, str(ROOT / "model_repository" / "nv-embed-v2" / "1"))

from nv_embed.compute.loading import load_engine
from nv_embed.models import read_checkpoint
from synthetic import write_layout

CHUNK = 2**24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--layers", type=int, default=32, help="of the published 32 (%(default)s)")
    parser.add_argument("--hidden-size", type=int, default=4096, help="all sizes in proportion (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_bytes = write_layout(folder, arguments.layers, arguments.hidden_size)
        plain = min(read_all(folder) for _ in range(2))
        result = {"gigabytes": round(num_bytes / 1e9, 3), "page_cache_gb_per_s": round(num_bytes / 1e9 / plain, 2)}
        if arguments.device != "cpu":
            result["bus_gb_per_s"] = round(bus_speed(arguments.device), 2)
        with HighWater() as host:
            started = time.monotonic()
            engine = load_engine(
                folder, read_checkpoint(folder), device=arguments.device, dtype="float16", compile_layers="off"
            )
            if arguments.device != "cpu":
                torch.cuda.synchronize(arguments.device)
            seconds = time.monotonic() - started
        weights = sum(parameter.nbytes for parameter in engine.model.network.parameters())
    host_bytes = host.peak - (weights if arguments.device == "cpu" else 0)
    result |= {
        "seconds": round(seconds, 2),
        "gb_per_s": round(num_bytes / 1e9 / seconds, 2),
        "weights_gigabytes": round(weights / 1e9, 3),
        "host_gigabytes_beside_weights": round(host_bytes / 1e9, 3),
    }
    print(
        f"{result['gigabytes']} GB in {result['seconds']} s: {result['gb_per_s']} GB/s; the page cache alone "
        f"{result['page_cache_gb_per_s']} GB/s; host memory beside the weights at most "
        f"{result['host_gigabytes_beside_weights']} GB"
    )
    print(json.dumps(result | {"layers": arguments.layers} | machine(arguments.device)))


def read_all(folder: Path) -> float:
    """Seconds to copy every byte of the checkpoint into one small buffer."""
    buffer = bytearray(CHUNK)
    started = time.monotonic()
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.monotonic() - started


def bus_speed(device: str) -> float:
    """GB/s from pinned host memory."""
    source = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        started = time.monotonic()
        target.copy_(source)
        torch.cuda.synchronize(device)
        seconds.append(time.monotonic() - started)
    return source.numel() / 1e9 / min(seconds)


class HighWater:
    """Peak of this process's own memory, mapped files not counted, above what it had at the start; in bytes."""

    def __enter__(self) -> HighWater:
        self._start, self.peak = self._now(), 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = max(self.peak, self._now() - self._start)
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.01):
            self.peak = max(self.peak, self._now() - self._start)

    @staticmethod
    def _now() -> int:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["RssAnon"].split()[0]) * 1024


if __name__ == "__main__":
    main()
