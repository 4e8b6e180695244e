"""What a CPU and a GPU do differently: whose turn it is, how a batch runs, what errors mean."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nv_embed.compute.host import free_memory
from nv_embed.compute.pieces import Pieces, Whole
from nv_embed.errors import DeviceError, DeviceLost, OutOfDeviceMemory, in_short
from nv_embed.models.protocol import Work
from nv_embed.sequence import TokenSequence

# Words of errors when memory runs out and torch's own allocator is not what noticed: of the CUDA runtime and what torch
# compiled, of cuBLAS, of cuBLAS in a new thread, on a CPU.
_OUT_OF_MEMORY = "out of memory", "ALLOC_FAILED", "cublasCreate", "DefaultCPUAllocator"


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """One batch."""

    vectors: npt.NDArray[np.float32]  # [S, dimension], rows of length 1, in the order of the sequences
    seconds: float  # that the device spent on them, pauses left out


NextBatch: TypeAlias = Callable[[], Sequence[TokenSequence] | None]
# Sequences to [S, dimension] float32 on the device.
Embed: TypeAlias = Callable[[Sequence[TokenSequence], Work], Tensor]


class Cpu:
    """Computes in the calling thread, piece by piece. Threads compute their batches beside each other."""

    torch_device = torch.device("cpu")

    def current(self) -> AbstractContextManager[object]:
        """Where streams, events and pinned memory are made that do not say for which device."""
        return nullcontext()

    def free_memory(self) -> int:
        """In bytes."""
        return free_memory()

    def compute(self, next_batch: NextBatch, embed: Embed, pause: Callable[[], None]) -> Computed | None:
        """See `Engine.compute`."""
        sequences = next_batch()
        if not sequences:
            return None
        work = Pieces(pause, torch.get_num_threads())
        started = time.monotonic()
        try:
            with torch.inference_mode():
                vectors = embed(sequences, work).numpy()
        except RuntimeError as error:  # no type of torch's says more
            if error is work.error or not _is_out_of_memory(error):
                raise
            raise _too_many(sequences, self.torch_device) from None
        return Computed(vectors, time.monotonic() - started - work.paused_seconds)


class Gpu:
    """Computes one batch after the other, whichever thread brings it.

    Each batch puts a mark where little of it is left to compute. The next batch is asked for when the device has
    reached that mark. So the host has prepared it by the time the device is free, and it is not chosen much earlier.
    """

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device
        self._turn = Lock()
        self._little_left = _event()

    def current(self) -> AbstractContextManager[object]:
        """Where streams, events and pinned memory are made that do not say for which device."""
        return torch.cuda.device(self.torch_device)

    def free_memory(self) -> int:
        """In bytes."""
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def compute(self, next_batch: NextBatch, embed: Embed, pause: Callable[[], None]) -> Computed | None:
        """See `Engine.compute`; never pauses."""
        with self._turn:
            try:
                self._little_left.synchronize()
            except torch.AcceleratorError as error:
                raise self._lost() from error
            sequences = next_batch()
            if not sequences:
                return None
            with self._errors(sequences), torch.inference_mode(), self.current():
                begun, ended = (_event(enable_timing=True) for _ in range(2))
                begun.record()
                vectors = embed(sequences, Whole(self._little_left.record))
                on_host = vectors.to("cpu", non_blocking=True)  # which torch puts into pinned memory
                ended.record()
        with self._errors(sequences):
            ended.synchronize()
            return Computed(on_host.numpy(), begun.elapsed_time(ended) / 1000)

    @contextmanager
    def _errors(self, sequences: Sequence[TokenSequence]) -> Iterator[None]:
        """In the terms of this project."""
        try:
            yield
        except RuntimeError as error:  # no type of torch's says more: an AcceleratorError may be either
            if not isinstance(error, torch.OutOfMemoryError):
                try:
                    torch.cuda.synchronize(self.torch_device)
                except torch.AcceleratorError:  # for ever, until the process ends
                    raise self._lost() from error
            if not _is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # which hold the batch's tensors
            torch.cuda.empty_cache()  # what torch keeps for later, no other library can allocate
            raise _too_many(sequences, self.torch_device) from None

    def _lost(self) -> DeviceLost:
        return DeviceLost(f"{self.torch_device} failed; the server must restart")


Device: TypeAlias = Cpu | Gpu


def existing_device(name: str) -> Device:
    """The device of a name, 'cpu' or 'cuda:N'; raises DeviceError if this machine has none."""
    if name == "cpu":
        return Cpu()
    device = torch.device(name)
    if device.index >= (count := torch.cuda.device_count()):
        seen = f"only cuda:0 to cuda:{count - 1} are visible" if count else f"no CUDA device is visible{_why_no_cuda()}"
        raise DeviceError(
            f"device: expected a device of this machine; got {name!r}, but {seen}; correct the setting "
            "('cpu' runs anywhere), or make the GPU visible"
        )
    return Gpu(device)


def _why_no_cuda() -> str:
    """Torch's own words: it was built without CUDA, or the driver is missing or too old."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:
        return f" ({in_short(error)})"
    return ""


def _event(*, enable_timing: bool = False) -> torch.cuda.Event:
    """One for which a thread waits asleep, not spinning."""
    return torch.cuda.Event(enable_timing=enable_timing, blocking=True)  # type: ignore[no-untyped-call]


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def _too_many(sequences: Sequence[TokenSequence], device: torch.device) -> OutOfDeviceMemory:
    num_tokens = sum(sequence.num_tokens for sequence in sequences)
    return OutOfDeviceMemory(f"{num_tokens} tokens, which the memory of {device} does not hold")
