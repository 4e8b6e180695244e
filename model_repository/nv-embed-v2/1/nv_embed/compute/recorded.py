"""Small batches of a GPU recorded as CUDA graphs: replayed with one launch instead of some hundreds.

A batch of few tokens takes as long as the GPU needs to read the weights, if only it is not kept waiting for launches.
A graph's shapes and addresses are fixed, so there is one for each of a few sizes, and a batch is filled up to the next
one with a text that nobody asked for. The pooling head runs on every token of it, pooled or not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from nv_embed.compute.attention import attend_each
from nv_embed.compute.packing import PackedBatch, pack
from nv_embed.compute.precision import least_cosine_of_repeats
from nv_embed.errors import DeviceError, in_short
from nv_embed.network import Network
from nv_embed.tokenizer import TokenSequence

logger = logging.getLogger(__name__)

# Of tokens. Up to the second, reading the weights takes longer than multiplying by them; beyond the last, launches are
# no longer what a batch waits for.
SIZES = (64, 128, 192, 256, 384, 512)
_TOKENS_A_SEQUENCE = 16  # a graph has room for one in so many; a query with the standard instruction has more

Outputs: TypeAlias = tuple[Tensor, Tensor]  # of `Network.head`
# Runs a computation, and returns how to run it again on what its inputs hold by then, into the same outputs.
Record: TypeAlias = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], None]]]


@dataclass(frozen=True, slots=True, eq=False)
class _Recording:
    """One size: `size` tokens of at most `num_slots` sequences, the filling one included."""

    size: int
    num_slots: int
    numbers: Tensor  # the inputs, [2 * size + num_slots + 1] int32: ids, positions, boundaries of sequences
    outputs: Outputs
    replay: Callable[[], None]
    batch: PackedBatch  # kept, for what was recorded reads its tensors


class RecordedBatches:
    """The recordings of one network on one device."""

    def __init__(self, network: Network, device: torch.device, record: Record, sizes: Sequence[int] = SIZES) -> None:
        """Record every size, the largest first, for the others can then use its memory."""
        self._network, self._device = network, device
        self._recordings = [self._recorded(size, record) for size in sorted(sizes, reverse=True)][::-1]

    def __call__(
        self, sequences: Sequence[TokenSequence], about_to_end: Callable[[], None] | None = None
    ) -> Tensor | None:
        """Vectors [S, C] float32, or None if no recording has room for these.

        `about_to_end` is called before all that is computed, which is little: the host takes almost as long to make
        the next batch ready.
        """
        num_tokens = sum(sequence.num_tokens for sequence in sequences)
        for recording in self._recordings:
            if num_tokens <= recording.size and len(sequences) < recording.num_slots:
                return self._replayed(recording, sequences, about_to_end)
        return None

    def check(self) -> None:
        """Compare with the network; raises ValueError."""
        ids = np.arange(40, dtype=np.int32) * 7919 % self._network.config.vocab_size
        sequences = [TokenSequence(ids[:23], 3), TokenSequence(ids[23:], 0)]
        expected = self._network(pack(sequences, self._device))
        least_cosine = least_cosine_of_repeats(self._network)
        for recording in self._recordings:
            for _ in range(2):  # what the first leaves behind must not show in the second
                cosine = (self._replayed(recording, sequences) * expected).sum(dim=1).min().item()
                if not cosine >= least_cosine:  # NaN is not, either
                    raise ValueError(
                        f"{recording.size} tokens replayed have a cosine of {cosine:.5f} to those computed"
                    )

    def _recorded(self, size: int, record: Record) -> _Recording:
        num_slots = size // _TOKENS_A_SEQUENCE + 1
        numbers = torch.zeros(2 * size + num_slots + 1, dtype=torch.int32, device=self._device)
        numbers.copy_(self._numbers(size, num_slots, []))
        input_ids, position_ids, cu_seqlens = numbers.split_with_sizes([size, size, num_slots + 1])
        every = torch.arange(size, dtype=torch.int32, device=self._device)
        # What the host knows of a batch's sequences is not to be recorded: a recording serves others.
        batch = PackedBatch(input_ids, position_ids, cu_seqlens, size, (), every, ())

        def compute() -> Outputs:
            x, cos, sin = self._network.begin(batch)
            for layer in self._network.layers:
                x = layer(x, cos, sin, batch, self._network.attend)
            return self._network.head(x, every)

        outputs, replay = record(compute)
        return _Recording(size, num_slots, numbers, outputs, replay, batch)

    def _numbers(self, size: int, num_slots: int, sequences: Sequence[TokenSequence]) -> Tensor:
        """The inputs on the host: the sequences, one that fills the rest, and empty ones."""
        num_tokens = sum(sequence.num_tokens for sequence in sequences)
        filling = [TokenSequence(np.zeros(size - num_tokens, dtype=np.int32), 0)] if num_tokens < size else []
        batch = pack([*sequences, *filling], torch.device("cpu"))
        boundaries = torch.full((num_slots + 1,), size, dtype=torch.int32)
        boundaries[: len(batch.cu_seqlens)] = batch.cu_seqlens
        numbers = torch.cat([batch.input_ids, batch.position_ids, boundaries])
        return numbers.pin_memory() if self._device.type == "cuda" else numbers

    def _replayed(
        self,
        recording: _Recording,
        sequences: Sequence[TokenSequence],
        about_to_end: Callable[[], None] | None = None,
    ) -> Tensor:
        numbers = self._numbers(recording.size, recording.num_slots, sequences)
        recording.numbers.copy_(numbers, non_blocking=True)
        if about_to_end:
            about_to_end()
        recording.replay()
        starts = np.cumsum([0] + [sequence.num_tokens for sequence in sequences])
        x, mlp = (
            torch.cat([out[start + sequence.num_masked : start + sequence.num_tokens]
                       for start, sequence in zip(starts, sequences, strict=False)])
            for out in recording.outputs
        )  # fmt: skip
        return self._network.pool(x, mlp, tuple(s.num_tokens - s.num_masked for s in sequences))


def record_on_gpu(device: torch.device) -> Record:
    """How `RecordedBatches` records on a GPU; what it is given shares memory, for no two are replayed at a time."""
    pool = torch.cuda.graph_pool_handle()
    aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # nothing can be recorded on the default one

    def record(compute: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        with torch.cuda.device(device):
            here = torch.cuda.current_stream(device)
            try:
                aside.wait_stream(here)
                with torch.cuda.stream(aside):
                    compute()  # libraries allocate what they need when they are first called: not to be recorded
                here.wait_stream(aside)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=aside):
                    outputs = compute()
            except BaseException:
                # A recording that fails leaves the other stream current, and the allocator in the midst of it: it would
                # give nothing back any more, also when memory runs out.
                torch.cuda.set_stream(here)
                with suppress(RuntimeError, AttributeError):
                    torch._C._cuda_endAllocateToPool(device.index, pool)
                raise
        return outputs, graph.replay

    return record


def record_batches(network: Network, choice: str, device: torch.device) -> RecordedBatches | None:
    """Record a filled network's small batches, and prove them.

    Args:
        choice: 'on', 'off', or 'auto': as far as it works. The log says what came of it.

    Returns:
        None where they are not recorded: on a CPU, which has no launches to save, and where attention goes one text
        after the other, by lengths that differ from batch to batch.

    Raises:
        DeviceError: it was asked for by name and does not work here, or the device broke.
    """
    if choice == "off" or device.type == "cpu":
        return None
    if network.attend is attend_each:
        logger.info("%s: small batches not recorded, for attention goes one text after the other", device)
        return None
    try:
        recorded = RecordedBatches(network, device, record_on_gpu(device))
        recorded.check()
    except (RuntimeError, ValueError) as error:
        reason = in_short(error)
        try:
            torch.cuda.synchronize(device)
        except torch.AcceleratorError:  # not what cannot be recorded, but whatever is computed from now on
            raise DeviceError(
                f"compile: recording small batches broke {device}: {reason}; set compile to 'off'"
            ) from None
        if choice == "auto":
            logger.warning("%s: small batches not recorded, which is slower, for: %s", device, reason)
            return None
        raise DeviceError(
            f"compile: expected small batches to be recorded on {device}; got: {reason}; set compile to 'auto' or 'off'"
        ) from None
    logger.info("%s: batches of up to %d tokens are replayed", device, max(SIZES))
    return recorded
