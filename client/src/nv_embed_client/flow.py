"""What a request needs of the network, step by step, as generators that do no I/O themselves.

A flow yields a `Step`; `exchange` has the step carried out and sends the outcome back in, or throws the `NVEmbedError`
that came of it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

from nv_embed_client.errors import DeadlineExceeded, NVEmbedError, ServerTooOld, Unavailable
from nv_embed_client.model_info import ModelInfo
from nv_embed_client.retry import RetryPolicy
from nv_embed_client.wire import EmbedRequest, EmbedResult

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Send:
    """Send the request; the outcome is an `EmbedResult`."""

    request: EmbedRequest
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class AskReady:
    """Ask whether the model is ready; the outcome is a bool."""

    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class AskModelInfo:
    """Ask what the model is; the outcome is a `ModelInfo`, or None."""

    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Sleep:
    """Pause; the outcome is None."""

    seconds: float


Step: TypeAlias = Send | AskReady | AskModelInfo | Sleep
Flow: TypeAlias = Generator[Step, Any, T]

_PROBE_SECONDS = 10.0  # longer than a transport needs to replace a dead connection


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in time."""

    at: float  # of time.monotonic

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def remaining_seconds(self) -> float:
        """May be negative."""
        return self.at - time.monotonic()

    def earlier(self, other: Deadline | None) -> Deadline:
        return self if other is None or self.at <= other.at else other


def embed(request: EmbedRequest, deadline: Deadline, retry: RetryPolicy) -> Flow[EmbedResult]:
    """One request, tried again while the server is unavailable and time is left.

    Raises:
        NVEmbedError: the error of the last attempt.
    """
    result: EmbedResult = yield from _persistently(partial(Send, request), deadline, retry)
    return result


def model_info(deadline: Deadline, retry: RetryPolicy) -> Flow[ModelInfo | None]:
    """What the model is, asked as `embed` asks; None: the server is too old to say."""
    try:
        info: ModelInfo | None = yield from _persistently(AskModelInfo, deadline, retry)
        return info
    except ServerTooOld:
        return None


def _persistently(step: Callable[[float], Step], deadline: Deadline, retry: RetryPolicy) -> Flow[Any]:
    """The outcome of a step, which is given the seconds that are left."""
    attempt = 1
    while True:
        remaining = deadline.remaining_seconds()
        if remaining <= 0:
            raise DeadlineExceeded("expected time left for the request; got none; give the call a longer timeout")
        try:
            return (yield step(remaining))
        except Unavailable as unavailable:
            error = unavailable
        pause = retry.pause_seconds(attempt, random.random())
        if pause is None or pause >= deadline.remaining_seconds():
            raise Unavailable(f"{error} (attempt {attempt}, the last)")
        yield Sleep(pause)
        attempt += 1


def probe(timeout_seconds: float = _PROBE_SECONDS) -> Flow[bool]:
    """Whether the model is ready now.

    Raises:
        NVEmbedError: anything other than an absent, stopping or starting server.
    """
    return (yield from _why_not_ready(timeout_seconds)) is None


def wait_until_ready(deadline: Deadline, where: str) -> Flow[None]:
    """Ask until the model is ready.

    Raises:
        DeadlineExceeded: it is not in time.
        NVEmbedError: the question fails in a way that waiting does not mend.
    """
    # Triton offers no readiness to subscribe to, so this asks, ever more slowly.
    policy, attempt = RetryPolicy(max_attempts=2**31, max_pause_seconds=1.0), 1
    while True:
        reason = yield from _why_not_ready(min(_PROBE_SECONDS, max(deadline.remaining_seconds(), 0.1)))
        if reason is None:
            return
        pause = policy.pause_seconds(attempt, random.random())
        assert pause is not None
        remaining = deadline.remaining_seconds()
        if remaining <= 0:
            raise DeadlineExceeded(
                f"expected a ready model at {where}; got none in time (the last answer: {reason}); check the address, "
                "the model's name and the server's log, or wait longer: large weights take minutes to load"
            )
        yield Sleep(min(pause, remaining))
        attempt += 1


def _why_not_ready(timeout_seconds: float) -> Flow[NVEmbedError | str | None]:
    try:
        return None if (yield AskReady(timeout_seconds)) else "the model is not loaded"
    except (Unavailable, DeadlineExceeded) as error:
        return error
