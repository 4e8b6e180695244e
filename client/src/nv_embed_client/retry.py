"""When to try again; knows no network and no clock."""

from __future__ import annotations

from dataclasses import dataclass

from nv_embed_client.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Pauses that double, with jitter, so that the clients of a server that restarts do not come back in step.

    The default tries for 6 to 12 seconds: longer than another replica needs to take over, shorter than anybody
    waits for a server that is not there. The deadline of the request ends it earlier.
    """

    max_attempts: int = 8
    first_pause_seconds: float = 0.1
    max_pause_seconds: float = 5.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise InvalidInput.of(
                expected="max_attempts of at least 1", got=str(self.max_attempts), remedy="1 tries once, without retry"
            )
        if not 0 < self.first_pause_seconds <= self.max_pause_seconds:
            raise InvalidInput.of(
                expected="0 < first_pause_seconds <= max_pause_seconds",
                got=f"{self.first_pause_seconds} and {self.max_pause_seconds}",
                remedy="correct them",
            )

    def pause_seconds(self, attempt: int, random: float) -> float | None:
        """The pause after a failed attempt, None when it was the last.

        Args:
            attempt: counted from 1.
            random: uniform in [0, 1); the pause is between half and all of what doubling gives.
        """
        if attempt >= self.max_attempts:
            return None
        # The exponent is bounded so that no number of attempts overflows a float.
        full: float = min(self.first_pause_seconds * 2.0 ** min(attempt - 1, 64), self.max_pause_seconds)
        return full * (1 + random) / 2


PATIENT = RetryPolicy(max_attempts=20)
"""Tries for half a minute to a minute: for long work, which a server that restarts should not end."""
