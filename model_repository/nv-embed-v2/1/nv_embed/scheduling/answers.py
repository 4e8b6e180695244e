"""Sends answers, and metrics between them, from a thread of its own; knows neither queue, engine nor Triton."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import count
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from nv_embed.embedding_type import EmbeddingType
from nv_embed.errors import RequestError
from nv_embed.metrics import Metric, Recorder, Update
from nv_embed.scheduling.vector_cache import Vector

logger = logging.getLogger(__name__)

LARGE_ANSWER_BYTES = 2**20  # a larger one takes long to copy
_PUBLISH_SECONDS = 0.2  # from an event to its metrics
_PACKED_ROWS = 64  # at a time, so that packing needs little memory beside its result


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a request gets: one vector for each of its N texts, in input order. None if it asks for none."""

    vectors: Sequence[Vector]  # N of [dim] and length 1, shared with the cache and with other answers
    token_counts: Sequence[int]  # N, as fed to the network
    is_truncated: Sequence[bool] | None = None  # N, whether the text was cut; None if the request does not ask
    embedding_type: EmbeddingType = EmbeddingType.FLOAT

    @property
    def num_bytes(self) -> int:
        """Of the embeddings as they are sent."""
        num_vectors = len(self.vectors)
        return num_vectors * self.embedding_type.num_bytes(len(self.vectors[0])) if num_vectors else 0

    def embeddings(self) -> npt.NDArray[Any]:
        """[N, dim] of the answer's type, or of signs [N, dim / 8]; packed anew at each call."""
        if self.embedding_type is EmbeddingType.FLOAT:
            return np.concatenate(self.vectors).reshape(len(self.vectors), -1)
        starts = range(0, len(self.vectors), _PACKED_ROWS)
        return np.concatenate(
            [self.embedding_type.packed(np.stack(self.vectors[start : start + _PACKED_ROWS])) for start in starts]
        )


Outcome: TypeAlias = Answer | RequestError
# When it should happen, a number that tells equal times apart, and what happens; None is the end.
_Event: TypeAlias = tuple[float, int, Callable[[], None] | None]


class Reply(Protocol):
    """The way back to one client. `send` is called exactly once."""

    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""

    def send(self, outcome: Outcome) -> Outcome:
        """Answer; returns what was sent, which is an error in place of an answer that this way cannot carry."""


class Outbox:
    """Owns every answer from `put` until it is sent."""

    def __init__(
        self,
        metrics: Recorder,
        *,
        collect: Callable[[], list[Update]],
        publish: Callable[[Update], None],
        on_lost: Callable[[], None],
        large_waits_seconds: float = 1.0,
    ) -> None:
        """
        Args:
            metrics: where answers are counted.
            collect: called a few times a second while something happens; what it returns is published.
            publish: takes one update of a metric.
            on_lost: called when an answer could not be sent, because nothing can reach its client any more.
            large_waits_seconds: answers that come within this time pass one of more than LARGE_ANSWER_BYTES.
        """
        self._metrics = metrics
        self._collect = collect
        self._publish = publish
        self._on_lost = on_lost
        self._large_waits_seconds = large_waits_seconds
        self._lock = Lock()
        self._num_unsent = self._num_unsent_texts = 0
        # A plain queue, because a thread that adds to it must not wait for this one, which sorts what it takes out.
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._ordered: list[_Event] = []
        self._numbers = count()  # of events that are equal in order
        self._thread = Thread(target=self._run, name="nv-embed-answer", daemon=True)
        self._thread.start()

    @property
    def num_unsent(self) -> int:
        """Answers that were put and are not sent."""
        return self._num_unsent

    @property
    def num_unsent_texts(self) -> int:
        """Of the answers with vectors that were put and are not sent."""
        return self._num_unsent_texts

    def put(self, reply: Reply, outcome: Outcome, kind: str, arrived: float | None = None) -> None:
        """Have an answer sent; `kind` and arrival of its request are for the metrics."""
        if arrived is not None:
            self._metrics.add(Metric.REQUEST_SECONDS, time.monotonic() - arrived, kind=kind)
        self._count_unsent(1, outcome)
        is_large = isinstance(outcome, Answer) and outcome.num_bytes > LARGE_ANSWER_BYTES
        self._add(time.monotonic() + is_large * self._large_waits_seconds, partial(self._send, reply, outcome, kind))

    def announce(self) -> None:
        """Say that something was counted: metrics go out also while no request is complete."""
        self._add(time.monotonic(), _nothing)

    def close(self) -> None:
        """Return when all is sent and the thread has ended."""
        self._add(math.inf, None)
        self._thread.join()

    def _add(self, order: float, event: Callable[[], None] | None) -> None:
        self._events.put((order, next(self._numbers), event))

    def _count_unsent(self, change: int, outcome: Outcome) -> None:
        with self._lock:
            self._num_unsent += change
            if isinstance(outcome, Answer):
                self._num_unsent_texts += change * len(outcome.vectors)

    def _send(self, reply: Reply, outcome: Outcome, kind: str) -> None:
        started = time.monotonic()
        sent = reply.send(outcome)
        self._count_unsent(-1, outcome)
        self._metrics.add(Metric.ANSWER_SECONDS, time.monotonic() - started)
        name = "ok" if isinstance(sent, Answer) else type(sent).__name__
        self._metrics.add(Metric.REQUESTS, kind=kind, outcome=name)

    def _run(self) -> None:
        while True:
            try:
                self._loop()
                return
            except BaseException:  # nobody else answers, so this goes on
                logger.exception("an answer is lost; every request gets an error and the server must restart")
                self._on_lost()

    def _loop(self) -> None:
        updates: deque[Update] = deque()
        collect_at, is_news = math.inf, False
        while True:
            now = time.monotonic()
            if now >= collect_at and not updates:
                updates.extend(self._collect())
                # Once more after the last event, because other threads may count just after they announced it.
                collect_at, is_news = (now + _PUBLISH_SECONDS if is_news else math.inf), False
            if self._is_event_there(0.0 if updates else max(collect_at - now, 0.0)):
                _, _, event = heappop(self._ordered)
                if event is None:
                    break
                collect_at, is_news = min(collect_at, time.monotonic() + _PUBLISH_SECONDS), True
                event()
                del event  # and with it the answer
            # One at a time, because each costs as much as a short query. An answer waits for no more than that.
            if updates:
                self._publish_safely(updates.popleft())
        for update in [*updates, *self._collect()]:
            self._publish_safely(update)

    def _is_event_there(self, wait_seconds: float) -> bool:
        """Put what has come in order; wait so long for the first event if there is none."""
        with suppress(Empty):
            if not self._ordered:
                heappush(self._ordered, self._events.get(timeout=wait_seconds if wait_seconds < math.inf else None))
            while True:
                heappush(self._ordered, self._events.get_nowait())
        return bool(self._ordered)

    def _publish_safely(self, update: Update) -> None:
        try:
            self._publish(update)
        except Exception:  # no reason to leave a request without its answer
            logger.exception("a metric is lost")


def _nothing() -> None:
    pass
