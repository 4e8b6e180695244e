"""The flows of one call and the transport, brought together: starts what is due and says how long to wait.

It waits for nothing itself and needs no thread. Both clients drive it, each with a wait of its own kind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

from nv_embed_client.errors import DeadlineExceeded
from nv_embed_client.flow import AskModelInfo, AskReady, Flow, Send
from nv_embed_client.transport import Transport

T = TypeVar("T")

_GRACE_SECONDS = 2.0  # a transport that has not ended a request this long after its deadline never will


@dataclass(frozen=True, slots=True)
class Together:
    """Flows to run at the same time. Each is taken when there is room for it."""

    flows: Iterator[Flow[Any]]
    max_at_once: int
    record: Callable[[Any], object]  # called with the value of each flow that ends


Plan: TypeAlias = Generator[Together, None, T]


def alone(flow: Flow[T]) -> Plan[T]:
    """The plan of one flow."""
    values: list[T] = []
    yield Together(iter([flow]), 1, values.append)
    return values[0]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A flow that waits for the transport, or for a time to come."""

    flow: Flow[Any]
    until: float
    future: Future[Any] | None  # None: the flow sleeps


class Exchange(Generic[T]):
    """One call on its way. Used by one thread or task."""

    def __init__(self, plan: Plan[T], transport: Transport, arrived: Callable[[int], None]) -> None:
        """
        Args:
            plan: what the call is made of.
            transport: carries its requests.
            arrived: called in any thread with the number of a request that has ended, for `receive`.
        """
        self._plan = plan
        self._transport = transport
        self._arrived = arrived
        self._part: Together | None = None
        self._waiting: dict[int, _Waiting] = {}
        self._num_started = 0
        self.result: T

    def advance(self) -> float | None:
        """Start all that can be started. Seconds to wait for an arrival; None when there is a `result`.

        Raises:
            NVEmbedError: how the call ends, if not with a result.
        """
        while True:
            now = time.monotonic()
            for number, waiting in list(self._waiting.items()):
                if waiting.until <= now:
                    self._wake(number)
            while self._part is not None and len(self._waiting) < self._part.max_at_once:
                flow = next(self._part.flows, None)
                if flow is None:
                    break
                self._step(flow, partial(next, flow))
            if self._waiting:
                times = [waiting.until - now for waiting in self._waiting.values()]
                check_seconds = self._transport.check()
                return max(0.0, min(times if check_seconds is None else [*times, check_seconds]))
            try:
                self._part = next(self._plan)
            except StopIteration as stop:
                self.result = stop.value
                return None

    def receive(self, number: int) -> None:
        """A request has ended."""
        waiting = self._waiting.pop(number, None)
        if waiting is None:  # it was given up
            return
        assert waiting.future is not None
        try:
            outcome = waiting.future.result()
        except (Exception, CancelledError) as error:
            self._step(waiting.flow, partial(waiting.flow.throw, error))
        else:
            self._step(waiting.flow, partial(waiting.flow.send, outcome))

    def close(self) -> None:
        """Give up what is on its way."""
        self._plan.close()
        while self._waiting:
            _, waiting = self._waiting.popitem()
            waiting.flow.close()
            if waiting.future is not None:
                waiting.future.cancel()

    def _wake(self, number: int) -> None:
        waiting = self._waiting.pop(number)
        if waiting.future is None:
            self._step(waiting.flow, partial(waiting.flow.send, None))
            return
        waiting.future.cancel()
        error = DeadlineExceeded("expected the request to end at its deadline; got nothing from the transport; retry")
        self._step(waiting.flow, partial(waiting.flow.throw, error))

    def _step(self, flow: Flow[Any], resume: Callable[[], Any]) -> None:
        """Let a flow go on to its next step, and start that."""
        try:
            step = resume()
        except StopIteration as stop:
            assert self._part is not None
            self._part.record(stop.value)
            return
        number = self._num_started
        self._num_started += 1
        now = time.monotonic()
        future: Future[Any]
        match step:
            case Send(request, timeout_seconds):
                future = self._transport.embed(request, timeout_seconds)
            case AskReady(timeout_seconds):
                future = self._transport.is_ready(timeout_seconds)
            case AskModelInfo(timeout_seconds):
                future = self._transport.model_info(timeout_seconds)
            case _:
                self._waiting[number] = _Waiting(flow, now + step.seconds, None)
                return
        self._waiting[number] = _Waiting(flow, now + timeout_seconds + _GRACE_SECONDS, future)
        future.add_done_callback(lambda _: self._arrived(number))
