"""Answers on their way out, each sent once, from a thread of its own; beside them what was counted meanwhile."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from nv_embed.errors import RequestError
from nv_embed.metrics import Metric, Recorder

logger = logging.getLogger(__name__)

_PUBLISH_SECONDS = 0.2  # from an event to its metrics: each value published costs as much as a short query ...
_OVERDUE_SECONDS = 1.0  # ... so answers go first, but not for longer than this


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a request gets: one row for each of its N texts, in input order."""

    embeddings: npt.NDArray[np.float32]  # [N, dim], rows of length 1
    token_counts: npt.NDArray[np.int32]  # [N], as fed to the network


Outcome: TypeAlias = Answer | RequestError


class Reply(Protocol):
    """The way back to one client. `send` is called exactly once."""

    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""

    def send(self, outcome: Outcome) -> Outcome:
        """Answer; returns what was sent, which is an error in place of an answer that this way cannot carry."""


class Outbox:
    """Sends in the order of `put`. Whoever computes does not wait for it."""

    def __init__(self, metrics: Recorder, *, publish: Callable[[], None], on_lost: Callable[[], None]) -> None:
        """
        Args:
            metrics: where answers are counted.
            publish: called a few times a second while there is something new.
            on_lost: called when an answer could not be sent, or the thread broke, which goes on all the same.
        """
        self._metrics = metrics
        self._publish = publish
        self._on_lost = on_lost
        self._lock = Lock()
        self._num_unsent = 0
        self._events: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._batch_seconds = 0.0  # spent sending since the end of a batch
        self._thread = Thread(target=self._run, name="nv-embed-answer", daemon=True)
        self._thread.start()

    @property
    def num_unsent(self) -> int:
        """Answers that were put and are not sent."""
        return self._num_unsent

    def put(self, reply: Reply, outcome: Outcome, kind: str) -> None:
        """Have an answer sent; `kind` of its request, for the metrics."""
        with self._lock:
            self._num_unsent += 1
        self._events.put(partial(self._send, reply, outcome, kind))

    def end_batch(self) -> None:
        """Say that a batch's answers were put. Its metrics go out even if it completed no request."""
        self._events.put(self._observe_batch)

    def close(self) -> None:
        """Return when all is sent and the thread has ended."""
        self._events.put(None)
        self._thread.join()

    def _send(self, reply: Reply, outcome: Outcome, kind: str) -> None:
        started = time.monotonic()
        sent = reply.send(outcome)
        self._batch_seconds += time.monotonic() - started
        with self._lock:
            self._num_unsent -= 1
        name = "ok" if isinstance(sent, Answer) else type(sent).__name__
        self._metrics.add(Metric.REQUESTS, kind=kind, outcome=name)

    def _observe_batch(self) -> None:
        self._metrics.observe(Metric.ANSWER_SECONDS, self._batch_seconds)
        self._batch_seconds = 0.0

    def _run(self) -> None:
        while True:
            try:
                self._loop()
                return
            except BaseException:
                logger.exception("the thread that answers broke; every request gets an error, the server must restart")
                self._on_lost()  # and go on: nobody else answers

    def _loop(self) -> None:
        publish_at, is_news = math.inf, False
        while True:
            now = time.monotonic()
            if now >= publish_at and (self._events.empty() or now >= publish_at + _OVERDUE_SECONDS):
                self._publish()
                # Once more after the last event, for what other threads count just after they announced it.
                publish_at, is_news = (now + _PUBLISH_SECONDS if is_news else math.inf), False
            try:
                event = self._events.get(timeout=max(publish_at - now, 0.0) if publish_at < math.inf else None)
            except Empty:
                continue
            if event is None:
                break
            try:
                event()
            except Exception:  # this client can be told nothing any more but by the end of the server
                logger.exception("an answer is lost; every request gets an error and the server must restart")
                self._on_lost()
            publish_at, is_news = min(publish_at, time.monotonic() + _PUBLISH_SECONDS), True
        self._publish()
