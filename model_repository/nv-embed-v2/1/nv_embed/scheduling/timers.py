"""Which request to look at again, and when; knows neither the clock nor the reason."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from itertools import count

from nv_embed.scheduling.states import Request


class Timers:
    """Requests by the time of their next look. Finished ones are forgotten sooner or later."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._numbers = count()  # looks at the same time come in the order in which they were set
        self._most = 1000

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def next_at(self) -> float:
        """The earliest time at which `due` has something to give. A finished request wakes nobody."""
        while self._heap and self._heap[0][-1].is_finished:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def set(self, request: Request, at: float) -> None:
        """Look at a request at this time. A time set before stands, too."""
        if len(self._heap) > self._most:
            self._heap = [timer for timer in self._heap if not timer[-1].is_finished]
            heapq.heapify(self._heap)
            self._most = 1000 + 4 * len(self._heap)
        heapq.heappush(self._heap, (at, next(self._numbers), request))

    def due(self, now: float) -> Iterator[Request]:
        """Unfinished requests whose time has come, each taken out as it is given."""
        while self.next_at <= now:
            yield heapq.heappop(self._heap)[-1]
