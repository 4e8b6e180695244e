"""Which sequence is computed next: self-clocked fair queueing; knows no threads and no requests.

Each sequence gets a tag, the virtual time at which its flow would have finished it were all flows served at once in
proportion to their weights; the lowest tag goes first and becomes the virtual time. So a new flow, a query or a small
request, passes the backlog of a large one at once; the large one keeps moving; nothing starves.
(Golestani, "A self-clocked fair queueing scheme for broadband applications", INFOCOM 1994.)
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(slots=True)
class Flow:
    """What shares one place in the queue: all queries together, or one request of documents."""

    weight: int
    kind: str = "documents"  # of one kind is what one batch holds
    last_tag: float = 0.0


class FairQueue(Generic[Item]):
    """Hashable items of known cost in tokens, in fair order. Not thread-safe: its owner holds a lock."""

    def __init__(self) -> None:
        self._heaps: defaultdict[str, list[tuple[float, int, int, Item]]] = defaultdict(list)  # by kind of flow
        self._arrivals = count()  # among equal tags the first to come goes first
        self._virtual_time = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._heaps.values()))

    def push(self, item: Item, flow: Flow, num_tokens: int, before: float = math.inf) -> float:
        """Add an item that costs `num_tokens`, unless its tag would not be below `before`; returns the lower of both.

        An item may so be queued again, for another flow that is ahead of the first. It is taken once.
        """
        tag = max(self._virtual_time, flow.last_tag) + num_tokens / flow.weight
        if tag >= before:
            return before
        flow.last_tag = tag
        heapq.heappush(self._heaps[flow.kind], (tag, next(self._arrivals), num_tokens, item))
        return tag

    def take(self, max_tokens: int, is_wanted: Callable[[Item], bool]) -> list[Item]:
        """Remove the next items of at most `max_tokens` together; a single larger one comes alone.

        All are of the kind of the very next one: a query that shared a batch with documents would be ready only when
        they are. Items that are no longer wanted are dropped on the way.
        """
        for heap in self._heaps.values():
            while heap and not is_wanted(heap[0][-1]):
                heapq.heappop(heap)
        heap = min(filter(None, self._heaps.values()), default=[])
        taken: dict[Item, None] = {}
        while heap:
            tag, _, num_tokens, item = heap[0]
            if item in taken or not is_wanted(item):
                heapq.heappop(heap)
                continue
            if taken and num_tokens > max_tokens:
                break
            heapq.heappop(heap)
            self._virtual_time = max(self._virtual_time, tag)
            taken[item] = None
            max_tokens -= num_tokens
        return list(taken)
