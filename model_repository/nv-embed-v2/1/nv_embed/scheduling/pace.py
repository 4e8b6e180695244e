"""How many tokens one engine computes at once: what its own batches show to take about the wanted time.

Knows neither engines nor clocks, nor what waits.
"""

from __future__ import annotations

MIN_BATCH_TOKENS = 512  # smaller batches leave any device idle between them
_SMOOTHING = 0.2  # the weight of the latest batch: one stall of the machine must not shrink the next batches to nothing


class Pace:
    """A token budget that follows the engine's speed.

    The speed found at the start is that of short texts and, usually, of an idle machine. Beside other work, or with
    long texts, whose attention costs more, the same number of tokens takes longer, and every query waits for it.
    """

    def __init__(self, most_tokens: int, target_seconds: float | None) -> None:
        """
        Args:
            most_tokens: what the budget begins with and never exceeds.
            target_seconds: how long a full batch may take; None: any time.
        """
        self._most_tokens = most_tokens
        self._target_seconds = target_seconds
        self._tokens = float(most_tokens)

    @property
    def max_batch_tokens(self) -> int:
        return int(self._tokens)

    def record(self, num_tokens: int, seconds: float) -> None:
        """Take note of a computed batch.

        One below half the budget says nothing about a full batch. Nor does a single text beyond it, which is computed
        alone whatever the budget, unless it was fast enough for a larger one.
        """
        if num_tokens < self._tokens / 2:
            return
        fitting = self._most_tokens if self._target_seconds is None else num_tokens * self._target_seconds / seconds
        if fitting < self._tokens < num_tokens:
            return
        tokens = self._tokens + _SMOOTHING * (fitting - self._tokens)
        self._tokens = min(max(tokens, MIN_BATCH_TOKENS), self._most_tokens)

    def record_out_of_memory(self, num_tokens: int) -> None:
        """Take note of a batch that did not fit: half of it is the budget, which grows again from there."""
        self._tokens = min(max(num_tokens / 2, MIN_BATCH_TOKENS), self._tokens)
