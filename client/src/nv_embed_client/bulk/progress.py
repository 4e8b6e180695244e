"""How far a job is, said on the standard error."""

from __future__ import annotations

import sys
import time
from typing import Literal, TypeAlias

from tqdm.auto import tqdm

Shown: TypeAlias = Literal["nothing", "bar", "lines"]
"""A bar is for a terminal, lines are for a log."""

_LINE_SECONDS = 30.0


class Progress:
    """Counts what is done, and shows it."""

    def __init__(self, num_rows: int, num_before: int, shown: Shown) -> None:
        """
        Args:
            num_rows: of the input.
            num_before: of these, what earlier runs did.
        """
        self.num_tokens = 0
        self._num_rows, self._num_done, self._num_failed = num_rows, num_before, 0
        self._shows_lines = shown == "lines"
        self._began = self._line_at = time.monotonic()
        self._bar = tqdm(total=num_rows, initial=num_before, unit=" texts", disable=shown != "bar", smoothing=0.05)

    @property
    def seconds(self) -> float:
        """Since this began."""
        return time.monotonic() - self._began

    def add(self, num_rows: int, num_failed: int, num_tokens: int) -> None:
        """A part is done."""
        tenth = 10 * self._num_done // self._num_rows
        self._num_done += num_rows
        self._num_failed += num_failed
        self.num_tokens += num_tokens
        failed = f", {self._num_failed} failed" if self._num_failed else ""
        rate = f"{self.num_tokens / self.seconds:,.0f} tokens/s{failed}"
        self._bar.set_postfix_str(rate, refresh=False)
        self._bar.update(num_rows)
        is_due = 10 * self._num_done // self._num_rows > tenth or time.monotonic() > self._line_at + _LINE_SECONDS
        if self._shows_lines and is_due and self._num_done < self._num_rows:
            self._line_at = time.monotonic()
            print(f"{self._num_done} of {self._num_rows} texts, {rate}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.close()
