"""Which sequence is computed next: self-clocked fair queueing; knows no threads and no requests.

Each sequence gets a tag, the virtual time at which its flow would have finished it were all flows served at once in
proportion to their weights; the lowest tag goes first and becomes the virtual time. So a new flow, a query or a small
request, passes the backlog of a large one at once; the large one keeps moving; nothing starves.
(Golestani, "A self-clocked fair queueing scheme for broadband applications", INFOCOM 1994.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(slots=True)
class Flow:
    """What shares one place in the queue: all queries together, or one request of documents."""

    weight: int
    last_tag: float = 0.0


class FairQueue(Generic[Item]):
    """Hashable items of known cost in tokens, in fair order. Not thread-safe: its owner holds a lock."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, Item]] = []
        self._arrivals = count()  # among equal tags the first to come goes first
        self._virtual_time = 0.0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, item: Item, flow: Flow, num_tokens: int, before: float = math.inf) -> float:
        """Add an item that costs `num_tokens`, unless its tag would not be below `before`; returns the lower of both.

        An item may so be queued again, for another flow that is ahead of the first. It is taken once.
        """
        tag = max(self._virtual_time, flow.last_tag) + num_tokens / flow.weight
        if tag >= before:
            return before
        flow.last_tag = tag
        heapq.heappush(self._heap, (tag, next(self._arrivals), num_tokens, item))
        return tag

    def take(self, max_tokens: int, is_wanted: Callable[[Item], bool]) -> list[Item]:
        """Remove the next items of at most `max_tokens` together; a single larger one comes alone.

        Items that are no longer wanted are dropped on the way.
        """
        taken: dict[Item, None] = {}
        while self._heap:
            tag, _, num_tokens, item = self._heap[0]
            if item in taken or not is_wanted(item):
                heapq.heappop(self._heap)
                continue
            if taken and num_tokens > max_tokens:
                break
            heapq.heappop(self._heap)
            self._virtual_time = tag
            taken[item] = None
            max_tokens -= num_tokens
        return list(taken)
