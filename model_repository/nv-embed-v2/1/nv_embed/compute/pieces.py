"""How a device divides a pass. A GPU does not; a CPU does, so that other work may come between the pieces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from nv_embed.models.protocol import FEWEST_ROWS

# About 0.12 s for one core.
_MULTIPLY_ADDS = 4_000_000_000


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True, slots=True)
class Whole:
    """All rows at once."""

    on_little_left: Callable[[], None] = nothing

    def pieces(self, num_rows: int, multiply_adds: int, fewest_rows: int = FEWEST_ROWS) -> Iterable[slice]:
        """See `Work`."""
        return (slice(0, num_rows),)

    def little_left(self) -> None:
        """See `Work`."""
        self.on_little_left()


class Pieces:
    """One pass, which calls `pause` after each fraction of a second of work. A short batch ends before that."""

    def __init__(self, pause: Callable[[], None], num_threads: int) -> None:
        """num_threads: that share an operation."""
        self._pause = pause
        self._most = _MULTIPLY_ADDS * num_threads
        self._since_pause = 0
        self.paused_seconds = 0.0
        self.error: BaseException | None = None  # that `pause` raised

    def pieces(self, num_rows: int, multiply_adds: int, fewest_rows: int = FEWEST_ROWS) -> Iterator[slice]:
        """See `Work`."""
        most_rows = max(self._most // multiply_adds, fewest_rows)
        for start in range(0, num_rows, most_rows):
            rows = slice(start, min(start + most_rows, num_rows))
            work = (rows.stop - start) * multiply_adds
            if self._since_pause and self._since_pause + work > self._most:
                self._take_pause()
            self._since_pause += work
            yield rows

    def _take_pause(self) -> None:
        started = time.monotonic()
        try:
            self._pause()
        except BaseException as error:
            self.error = error
            raise
        self.paused_seconds += time.monotonic() - started
        self._since_pause = 0

    def little_left(self) -> None:
        """See `Work`. A thread of the CPU chooses its next batch when it has computed this one."""
