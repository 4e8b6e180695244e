"""Which sequence is computed next: self-clocked fair queueing; knows no threads and no requests.

What waits first in a flow has a tag, the virtual time at which the flow would have finished it were all flows served at
once in proportion to their weights; the lowest tag goes first and becomes the virtual time. So a new flow, a query or a
small request, passes the backlog of a large one at once; the large one keeps moving; nothing starves. A long sequence
waits for what is shorter, as its share of the device wants it.
(Golestani, "A self-clocked fair queueing scheme for broadband applications", INFOCOM 1994.)
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


@dataclass(slots=True, eq=False)
class Flow:
    """What shares one place in the queue: all queries together, or one request of documents."""

    weight: int
    kind: str = "documents"  # of one kind is what one batch holds
    last_tag: float = 0.0  # of what was taken last, or the virtual time when its idle time ended
    waiting: deque[tuple[Any, int]] = field(default_factory=deque)  # items and what they cost
    is_queued: bool = False


class FairQueue(Generic[Item]):
    """Hashable items of known cost in tokens, in fair order. Not thread-safe: its owner holds a lock."""

    def __init__(self) -> None:
        self._heaps: defaultdict[str, list[tuple[float, int, Flow]]] = defaultdict(list)  # flows, by kind
        self._arrivals = count()  # among equal tags the first to come goes first
        self._virtual_time = 0.0

    def __bool__(self) -> bool:
        """Whether there may be something to take."""
        return any(self._heaps.values())

    def push(self, item: Item, flow: Flow, num_tokens: int) -> None:
        """Add an item that costs `num_tokens`; one that waits in several flows is taken once, with the first."""
        flow.waiting.append((item, num_tokens))
        if not flow.is_queued:
            flow.last_tag = max(flow.last_tag, self._virtual_time)  # for the time in which it was idle it gets nothing
            self._queue(flow)

    def forget(self, flow: Flow) -> None:
        """Drop what waits in a flow to which nothing will be added any more."""
        flow.waiting.clear()

    def take(self, max_tokens: int, is_wanted: Callable[[Item], bool]) -> list[Item]:
        """Remove the next items of at most `max_tokens` together; a single larger one comes alone.

        All are of the kind of the very next one: a query that shared a batch with documents would be ready only when
        they are. Items that are no longer wanted are dropped on the way.
        """
        taken: dict[Item, None] = {}

        def is_next(item: Item) -> bool:
            return item not in taken and is_wanted(item)

        for heap in self._heaps.values():
            self._drop_heads(heap, is_next)
        heap = min(filter(None, self._heaps.values()), key=lambda heap: heap[0][:2], default=[])
        while heap and (not taken or heap[0][-1].waiting[0][1] <= max_tokens):
            tag, _, flow = heapq.heappop(heap)
            item, num_tokens = flow.waiting.popleft()
            taken[item] = None
            max_tokens -= num_tokens
            flow.last_tag = tag
            self._virtual_time = max(self._virtual_time, tag)  # of the other kind something lower may still wait
            self._queue(flow)
            self._drop_heads(heap, is_next)
        return list(taken)

    def _drop_heads(self, heap: list[tuple[float, int, Flow]], is_next: Callable[[Item], bool]) -> None:
        """Have a heap begin with a flow whose first item is to be taken next, unless there is none."""
        while heap and not (heap[0][-1].waiting and is_next(heap[0][-1].waiting[0][0])):
            _, _, flow = heapq.heappop(heap)
            while flow.waiting and not is_next(flow.waiting[0][0]):
                flow.waiting.popleft()
            self._queue(flow)

    def _queue(self, flow: Flow) -> None:
        """Give a flow that is in no heap its place, if anything waits in it."""
        flow.is_queued = bool(flow.waiting)
        if flow.waiting:
            _, num_tokens = flow.waiting[0]
            tag = flow.last_tag + num_tokens / flow.weight
            heapq.heappush(self._heaps[flow.kind], (tag, next(self._arrivals), flow))
