"""Which text is computed next: self-clocked fair queueing; knows no threads, no clock and no requests.

The first text of each flow has a tag: the virtual time at which the flow would have finished it if all flows were
served at once in proportion to their weights. The lowest tag goes first and becomes the virtual time. So a new flow, a
query or a small request, passes the backlog of a large one at once, the large one keeps moving, and nothing starves.
(Golestani, "A self-clocked fair queueing scheme for broadband applications", INFOCOM 1994.)

A text's place counts at most 512 of its tokens. Without that limit a few busy clients with short texts would keep a
long one waiting for minutes. Its flow pays for the rest of it afterwards.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Generic, Literal, TypeAlias, TypeVar

Item = TypeVar("Item")
# A batch holds texts of one kind. A query that shared a batch with documents would be ready only when they are. A long
# text is larger than any batch, so it is computed alone.
Kind: TypeAlias = Literal["queries", "documents", "long"]

_MOST_TOKENS_OF_A_PLACE = 512


@dataclass(slots=True, eq=False)
class Flow:
    """What shares one place in the queue: all queries together, or one request of documents."""

    weight: int
    kind: Literal["queries", "documents"] = "documents"
    last_tag: float = 0.0  # of what was taken last, or the virtual time when the flow was last idle
    waiting: deque[tuple[Any, int]] = field(default_factory=deque)  # items and their tokens
    is_queued: bool = False


class FairQueue(Generic[Item]):
    """Items of known size in fair order. Not thread-safe: its owner holds a lock."""

    def __init__(self, long_tokens: int, is_wanted: Callable[[Item], bool]) -> None:
        """
        Args:
            long_tokens: an item of more tokens is long.
            is_wanted: an item for which this is False when its turn comes is dropped, and its flow pays nothing.
        """
        self._long_tokens = long_tokens
        self._is_wanted = is_wanted
        # Flows by the kind of their first item. Among equal tags the first to come goes first.
        self._heaps: dict[Kind, list[tuple[float, int, Flow]]] = {"queries": [], "documents": [], "long": []}
        self._arrivals = count()
        self._virtual_time = 0.0

    def push(self, item: Item, flow: Flow, num_tokens: int) -> None:
        """Add an item at the end of a flow."""
        flow.waiting.append((item, num_tokens))
        if not flow.is_queued:
            flow.last_tag = max(flow.last_tag, self._virtual_time)  # an idle flow saves up no credit
            self._queue(flow)

    def forget(self, flow: Flow) -> None:
        """Drop what waits in a flow."""
        flow.waiting.clear()

    def next_kind(self, *, with_long: bool = True) -> Kind | None:
        """The kind of the very next item, None if nothing waits. `with_long` False: as if no long item waited."""
        for heap in self._heaps.values():
            self._drop_unwanted(heap)
        waiting = [kind for kind, heap in self._heaps.items() if heap and (with_long or kind != "long")]
        return min(waiting, key=lambda kind: self._heaps[kind][0][:2], default=None)

    def peek(self, kind: Kind) -> tuple[Item, int] | None:
        """The next item of a kind and its tokens."""
        heap = self._heaps[kind]
        self._drop_unwanted(heap)
        return heap[0][-1].waiting[0] if heap else None

    def pop(self, kind: Kind, cost: int) -> None:
        """Take what `peek` returned; its flow pays for `cost` tokens."""
        tag, _, flow = heapq.heappop(self._heaps[kind])
        flow.waiting.popleft()
        # All queries are one flow: the next query must not pay for somebody else's long one.
        paid = min(cost, _MOST_TOKENS_OF_A_PLACE) if flow.kind == "queries" else cost
        flow.last_tag += paid / flow.weight
        self._virtual_time = max(self._virtual_time, tag)  # a lower tag of another kind may still wait
        self._queue(flow)

    def _drop_unwanted(self, heap: list[tuple[float, int, Flow]]) -> None:
        """Let a heap begin with a flow whose first item is wanted, or be empty."""
        while heap and not (heap[0][-1].waiting and self._is_wanted(heap[0][-1].waiting[0][0])):
            _, _, flow = heapq.heappop(heap)
            while flow.waiting and not self._is_wanted(flow.waiting[0][0]):
                flow.waiting.popleft()
            self._queue(flow)

    def _queue(self, flow: Flow) -> None:
        """Give a flow that is in no heap its place, if anything waits in it."""
        flow.is_queued = bool(flow.waiting)
        if flow.waiting:
            _, num_tokens = flow.waiting[0]
            kind: Kind = "long" if num_tokens > self._long_tokens else flow.kind
            tag = flow.last_tag + min(num_tokens, _MOST_TOKENS_OF_A_PLACE) / flow.weight
            heapq.heappush(self._heaps[kind], (tag, next(self._arrivals), flow))
