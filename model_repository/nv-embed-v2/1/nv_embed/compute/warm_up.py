"""Brings an engine to full speed before the first request, and finds how many tokens it computes in a given time."""

from __future__ import annotations

import logging
import math
import time

import numpy as np

from nv_embed.compute.engine import Engine
from nv_embed.errors import CheckpointError, DeviceError, DeviceLost, OutOfDeviceMemory
from nv_embed.sequence import TokenSequence

logger = logging.getLogger(__name__)

# About 128 tokens, a passage's usual length within a factor of two.
SAMPLE_TEXT = "Water boils at a lower temperature on a mountain, where the air presses less on it. " * 7
_MOST_TOKENS = 65536  # of a batch: beyond it no device gains, while a query waits longer


def warm_up(
    engine: Engine,
    sequence: TokenSequence,
    target_seconds: float,
    fewest_tokens: int,
    most_tokens: int | None = None,
) -> int:
    """Compute ever larger batches, and return how many tokens take about `target_seconds`.

    Args:
        engine: to be warmed up.
        sequence: what the batches hold, many times; as long as texts usually are.
        target_seconds: of a batch.
        fewest_tokens: what the engine must be able to compute at once.
        most_tokens: nothing larger is tried, unless `fewest_tokens` is, because the device keeps the memory.

    Raises:
        CheckpointError: the vectors are no numbers.
        DeviceError: the device computes nothing, breaks, or has no memory for it beside the weights.
    """

    def embed(num_tokens: int) -> float:
        """Seconds for `num_tokens`, scaled from those of a whole number of sequences."""
        num_sequences = max(num_tokens // sequence.num_tokens, 1)
        started = time.monotonic()
        engine.embed([sequence] * num_sequences)
        return (time.monotonic() - started) * num_tokens / (num_sequences * sequence.num_tokens)

    def measure(num_tokens: int) -> float:
        """The fastest of three: the first one pays for allocation, each for what else the machine does."""
        return min(embed(num_tokens) for _ in range(3))

    try:
        if not np.isfinite(engine.embed([sequence])).all():
            raise CheckpointError(
                "expected weights that make vectors of finite numbers; got NaN or infinity; download them again, or "
                "set dtype to 'bfloat16' or 'float32' if the numbers exceed the range of 'float16'"
            )
        num_tokens, largest = fewest_tokens, most_tokens or _MOST_TOKENS
        seconds = measure(num_tokens)
        while seconds < target_seconds / 2 and 2 * num_tokens <= largest:
            try:
                seconds = measure(2 * num_tokens)
                num_tokens *= 2
            except OutOfDeviceMemory:
                largest = num_tokens
        fitting = min(math.floor(num_tokens * target_seconds / seconds), largest)
        fitting = max(fitting, fewest_tokens)
        if fitting > num_tokens:  # in time, but in memory?
            try:
                embed(fitting)
            except OutOfDeviceMemory:
                fitting = num_tokens
    except (OutOfDeviceMemory, DeviceLost) as error:
        raise DeviceError(
            f"expected {engine.device} to compute {fewest_tokens} tokens; got: {error}; free memory on it, or choose "
            "another device"
        ) from None
    logger.info(
        "%s: %.0f tokens/s, so %d tokens take about %.0f ms",
        engine.device, num_tokens / seconds, fitting, 1000 * fitting * seconds / num_tokens,
    )  # fmt: skip
    return fitting
