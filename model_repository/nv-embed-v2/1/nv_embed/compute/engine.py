"""A checkpoint to a ready engine, token sequences to vectors; the only file that knows devices."""

from __future__ import annotations

import logging
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import Lock
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from nv_embed.compute.attention import choose_attention
from nv_embed.compute.compiled import compile_network
from nv_embed.compute.packing import pack
from nv_embed.compute.precision import Precision, Rounding
from nv_embed.compute.recorded import RecordedBatches, record_batches
from nv_embed.compute.weights import load_network
from nv_embed.config import CheckpointConfig
from nv_embed.errors import DeviceError, DeviceLost, OutOfDeviceMemory, in_short
from nv_embed.network import Network
from nv_embed.scheduling.pace import MIN_BATCH_TOKENS
from nv_embed.tokenizer import TokenSequence

logger = logging.getLogger(__name__)

_WARM_UP_SEQUENCE_TOKENS = 128  # a passage's usual length, within a factor of two
# What is said for want of memory where torch's own allocator did not find it: by the CUDA runtime and what torch
# compiled, by cuBLAS, by cuBLAS of a new thread, on a CPU.
_OUT_OF_MEMORY = "out of memory", "ALLOC_FAILED", "cublasCreate", "DefaultCPUAllocator"
_MAX_BATCH_TOKENS = 65536  # beyond it no device gains, while a query waits longer
_MEMORY_HEADROOM = 1.1  # activations, workspaces and the allocator's slack, over the weights
# Below this hidden_size the threads that share an operation on a CPU wait for each other for too much of the time.
_WIDE = 1024
_MOST_CPU_BATCHES = 8  # at a time: each has activations of its own, a gigabyte for the longest text

# Waits for a batch that was started, and returns its vectors and the seconds it took the device.
Finish: TypeAlias = Callable[[], tuple[npt.NDArray[np.float32], float]]


class Engine:
    """One network on one device.

    `with engine.turn: finish = engine.start(...)`, and then `finish()`, by any number of threads: on a CPU their
    batches are computed beside each other; on a GPU one after the other, the next one chosen and started when the one
    before has little left to compute.
    """

    def __init__(
        self, network: Network, device: torch.device, *, is_compiled: bool = False,
        recorded: RecordedBatches | None = None,
    ) -> None:  # fmt: skip
        self.network = network
        self.device = device
        self.is_compiled = is_compiled
        self.recorded = recorded
        if device.type == "cuda":
            self._lock = Lock()
            self._little_left = _event()

    @classmethod
    def load(
        cls,
        folder: Path,
        config: CheckpointConfig,
        *,
        device: str,
        dtype: str,
        attention: str = "auto",
        compile_layers: str = "auto",
    ) -> Engine:
        """Load a checkpoint.

        Args:
            folder: of `config.json` and the safetensors files.
            config: what the former says.
            device: 'cpu' or 'cuda:N'.
            dtype: see `Precision.choose`.
            attention: see `choose_attention`.
            compile_layers: see `compile_network`; with it small batches of a GPU are recorded, see `record_batches`.

        Raises:
            DeviceError: the device is absent, its free memory too small, the attention kernel or a compiler missing,
                or the precision not to be had or too coarse.
            CheckpointError: files or tensors are missing, damaged or of another model.
        """
        target = _existing_device(device)
        precision = Precision.choose(dtype, target, config)
        with torch.device("meta"):
            network = Network(config).to(precision.dtype).eval()
        _check_memory(target, precision.num_bytes(network), precision)
        network.attend = choose_attention(attention, config, target, precision.dtype)
        rounding = Rounding.of_checkpoint(folder, network, precision) if precision.matrix else None
        try:
            with torch.inference_mode():
                load_network(folder, network, target, rounding)
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            raise DeviceError(
                f"{target}: loading the weights in {precision.name} failed: {in_short(error)}; see that nothing else "
                "runs on it"
            ) from None
        return cls.of_network(network, target, compile_layers)

    @classmethod
    def of_network(cls, network: Network, device: torch.device, compile_layers: str) -> Engine:
        """Of a network whose weights are there; see `load`."""
        with torch.inference_mode(), _current(device):
            is_compiled = compile_network(network, compile_layers, device)
            return cls(
                network, device, is_compiled=is_compiled, recorded=record_batches(network, compile_layers, device)
            )

    @property
    def turn(self) -> AbstractContextManager[None]:
        """To be held while a batch is chosen and started.

        On a GPU the device itself says when: a batch puts a mark where little of it is left, and the next turn begins
        when the device has come there. So the host's work for a batch is done by the time the device is free, and yet
        no batch is chosen much before. Raises DeviceLost.
        """
        return self._turn_on_gpu() if self.device.type == "cuda" else nullcontext()

    @contextmanager
    def _turn_on_gpu(self) -> Iterator[None]:
        with self._lock:
            try:
                self._little_left.synchronize()
            except torch.AcceleratorError as error:
                raise _lost(self.device) from error
            yield

    def embed(self, sequences: Sequence[TokenSequence]) -> npt.NDArray[np.float32]:
        """`start`, and wait for the vectors."""
        with self.turn:
            finish = self.start(sequences)
        return finish()[0]

    def start(self, sequences: Sequence[TokenSequence]) -> Finish:
        """Embed sequences in one forward pass, which on a GPU goes on after this has returned; `turn` must be held.

        Returns:
            what waits for [len(sequences), hidden_size], rows of length 1 in the same order. A row does not depend on
            the others.

        Raises:
            OutOfDeviceMemory: they do not fit together; fewer may.
            DeviceLost: the device is beyond use for this process; what is returned raises it, too.
        """
        if self.device.type == "cpu":
            started = time.monotonic()
            with self._errors(sequences):
                embeddings = self.network(pack(sequences, self.device)).numpy()
            seconds = time.monotonic() - started
            return lambda: (embeddings, seconds)
        with self._errors(sequences), _current(self.device):
            begun, ended = (_event(enable_timing=True) for _ in range(2))
            begun.record()
            vectors = self.recorded(sequences, self._little_left.record) if self.recorded else None
            if vectors is None:
                vectors = self.network(pack(sequences, self.device), self._little_left.record)
            on_host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
            on_host.copy_(vectors, non_blocking=True)
            ended.record()

        def finish() -> tuple[npt.NDArray[np.float32], float]:
            with self._errors(sequences):
                ended.synchronize()
                return on_host.numpy(), begun.elapsed_time(ended) / 1000

        return finish

    @contextmanager
    def _errors(self, sequences: Sequence[TokenSequence]) -> Iterator[None]:
        """In the terms of this project."""
        try:
            with torch.inference_mode():
                yield
        except torch.OutOfMemoryError:
            raise OutOfDeviceMemory(_too_many(sequences, self.device)) from None
        except RuntimeError as error:  # no type of torch's says more: an AcceleratorError may be either
            if self.device.type == "cuda":
                try:
                    torch.cuda.synchronize(self.device)
                except torch.AcceleratorError:  # for ever, until the process ends
                    raise _lost(self.device) from error
            if not any(words in str(error) for words in _OUT_OF_MEMORY):
                raise
            if self.device.type == "cuda":
                traceback.clear_frames(error.__traceback__)  # which hold the batch's tensors
                torch.cuda.empty_cache()  # what torch keeps for later, no other library can allocate
            raise OutOfDeviceMemory(_too_many(sequences, self.device)) from None

    def warm_up(self, target_seconds: float, max_batch_tokens: int | None = None) -> int:
        """Bring the first real request to full speed, and return how many tokens take about `target_seconds`.

        Of more than `max_batch_tokens` at once, or 512 if that is more, nothing is tried: the device keeps the memory.

        Raises:
            DeviceError: the device computes nothing, breaks, or has no memory for it beside the weights.
        """
        try:
            return self._warm_up(target_seconds, max_batch_tokens or _MAX_BATCH_TOKENS)
        except (OutOfDeviceMemory, DeviceLost) as error:
            raise DeviceError(
                f"expected {self.device} to compute {MIN_BATCH_TOKENS} tokens; got: {error}; free memory on it, or "
                "choose another device"
            ) from None

    def _warm_up(self, target_seconds: float, largest: int) -> int:
        sequence = TokenSequence(np.ones(_WARM_UP_SEQUENCE_TOKENS, dtype=np.int32), 0)

        def measure(num_tokens: int) -> float:
            """Seconds of the fastest of a few runs: the first pays for allocation, any for what else runs here."""
            seconds = []
            for _ in range(3):
                started = time.monotonic()
                self.embed([sequence] * (num_tokens // _WARM_UP_SEQUENCE_TOKENS))
                seconds.append(time.monotonic() - started)
            return min(seconds)

        self.embed([sequence])
        num_tokens = MIN_BATCH_TOKENS
        seconds = measure(num_tokens)
        while seconds < target_seconds / 2 and 2 * num_tokens <= largest:
            try:
                seconds = measure(2 * num_tokens)
                num_tokens *= 2
            except OutOfDeviceMemory:
                largest = num_tokens
        fitting = math.floor(num_tokens * target_seconds / seconds)
        fitting = min(max(fitting, MIN_BATCH_TOKENS), largest)
        if fitting > num_tokens:  # in time, but in memory?
            try:
                self.embed([sequence] * (fitting // _WARM_UP_SEQUENCE_TOKENS))
            except OutOfDeviceMemory:
                fitting = num_tokens
        logger.info(
            "%s: %.0f tokens/s, so %d tokens take about %.0f ms",
            self.device, num_tokens / seconds, fitting, 1000 * fitting * seconds / num_tokens,
        )  # fmt: skip
        return fitting


def load_engines(
    folder: Path,
    config: CheckpointConfig,
    *,
    devices: Sequence[str],
    dtype: str,
    attention: str = "auto",
    compile_layers: str = "auto",
) -> list[Engine]:
    """What threads compute with: an entry for each of them, see `Engine` and `Engine.load`.

    Entries for the same device are the same engine. A GPU has two, one of which starts a batch while the other waits
    for one. If only the CPU is named, and once, it has one for all cores where the network is wide, and one for each
    core, up to 8, where it is narrow; else as many as it was named.
    """
    if "cpu" in devices:  # first of all: what is compiled is compiled for a number of threads
        num_cores = _num_cores()
        if list(devices) == ["cpu"] and config.hidden_size < _WIDE:
            devices = ["cpu"] * min(num_cores, _MOST_CPU_BATCHES)
        num_batches = devices.count("cpu")
        torch.set_num_threads(max(1, num_cores // num_batches))
        logger.info("cpu: %d batches at a time, %d threads each", num_batches, torch.get_num_threads())
    engines = {
        device: Engine.load(
            folder, config, device=device, dtype=dtype, attention=attention, compile_layers=compile_layers
        )
        for device in dict.fromkeys(devices)
    }
    return [engines[device] for device in devices for _ in range(1 if device == "cpu" else 2)]


def _num_cores() -> int:
    """Cores to compute on: torch's own choice, which OMP_NUM_THREADS bounds, and no more than the container's share."""
    num_cores, quota = torch.get_num_threads(), Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file() and os.access(quota, os.R_OK):
        limit, period = quota.read_text(encoding="ascii").split()
        if limit != "max":
            num_cores = min(num_cores, math.ceil(int(limit) / int(period)))
    return max(num_cores, 1)


def _event(*, enable_timing: bool = False) -> torch.cuda.Event:
    """One that is waited for asleep."""
    return torch.cuda.Event(enable_timing=enable_timing, blocking=True)  # type: ignore[no-untyped-call]


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Where streams, events and pinned memory are made that do not say for which GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _lost(device: torch.device) -> DeviceLost:
    return DeviceLost(f"{device} failed; the server must restart")


def _too_many(sequences: Sequence[TokenSequence], device: torch.device) -> str:
    return f"{sum(sequence.num_tokens for sequence in sequences)} tokens, which the memory of {device} does not hold"


def _existing_device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and device.index >= (count := torch.cuda.device_count()):
        seen = f"only cuda:0 to cuda:{count - 1} are visible" if count else f"no CUDA device is visible{_why_no_cuda()}"
        raise DeviceError(
            f"device: expected a device of this machine; got {name!r}, but {seen}; correct the parameter or "
            "NV_EMBED_DEVICE ('cpu' runs anywhere), or make the GPU visible"
        )
    return device


def _why_no_cuda() -> str:
    """What torch says of it: that it was built without, or that the driver is missing or too old."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:
        return f" ({in_short(error)})"
    return ""


def _check_memory(device: torch.device, num_bytes: int, precision: Precision) -> None:
    needed = int(num_bytes * _MEMORY_HEADROOM)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_host_memory()
    if needed > free:
        raise DeviceError(
            f"{device}: expected {needed / 1e9:.1f} GB of free memory for the weights in {precision.name}; got "
            f"{free / 1e9:.1f} GB; free memory on it or choose another device"
            + ("" if precision.matrix else ", or a dtype of fewer bytes: int8 has the fewest")
        )


def _free_host_memory() -> int:
    """Bytes a process may take without swapping: the kernel's estimate, and no more than its container's limit."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and os.access(limit, os.R_OK) and (value := limit.read_text(encoding="ascii").strip()) != "max":
        available = min(available, int(value))
    return available
