"""What a request needs of the network, step by step, as generators that do no I/O themselves.

A flow yields a `Step`; whoever runs it carries the step out and sends the outcome back in, or throws what
tritonclient raised. The sync and the async client differ in nothing but how they carry out three kinds of step.
"""

from __future__ import annotations

import random
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from tritonclient.utils import InferenceServerException

from nv_embed_client.errors import DeadlineExceeded, Unavailable
from nv_embed_client.retry import RetryPolicy
from nv_embed_client.wire import EmbedResult, InferRequest, error_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Send:
    """Send the request; the outcome is tritonclient's reply."""

    request: InferRequest
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class AskReady:
    """Ask whether the model is ready; the outcome is a bool."""

    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Sleep:
    """Pause; the outcome is None."""

    seconds: float


Step: TypeAlias = Send | AskReady | Sleep
Flow: TypeAlias = Generator[Step, Any, T]

_PROBE_SECONDS = 5.0


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


def embed(request: InferRequest, deadline: Deadline, retry: RetryPolicy) -> Flow[EmbedResult]:
    """One request, tried again while the server is unavailable and time is left.

    Raises:
        NVEmbedError: the error of the last attempt.
    """
    attempt = 1
    while True:
        remaining = deadline.remaining_seconds()
        if remaining <= 0:
            raise DeadlineExceeded("expected time left for the request; got none; give the call a longer timeout")
        try:
            return request.decode((yield Send(request, remaining)))
        except InferenceServerException as raw:
            error = error_of(raw)
        if not isinstance(error, Unavailable):
            raise error
        pause = retry.pause_seconds(attempt, random.random())
        if pause is None or pause >= deadline.remaining_seconds():
            raise Unavailable(f"{error} (attempt {attempt}, the last)")
        yield Sleep(pause)
        attempt += 1


def probe(timeout_seconds: float = _PROBE_SECONDS) -> Flow[bool]:
    """Whether the model is ready now.

    Raises:
        NVEmbedError: something else than an absent, stopping or starting server.
    """
    try:
        return bool((yield AskReady(timeout_seconds)))
    except InferenceServerException as raw:
        error = error_of(raw)
    if isinstance(error, Unavailable | DeadlineExceeded):
        return False
    raise error


def wait_until_ready(deadline: Deadline, where: str) -> Flow[None]:
    """Ask until the model is ready.

    Raises:
        DeadlineExceeded: it is not in time.
        NVEmbedError: asking fails in a way that waiting does not mend.
    """
    # Triton offers no readiness to subscribe to, so this asks, ever more slowly.
    policy, attempt = RetryPolicy(max_attempts=2**31, max_pause_seconds=1.0), 1
    while not (yield from probe(min(_PROBE_SECONDS, max(deadline.remaining_seconds(), 0.1)))):
        pause = policy.pause_seconds(attempt, random.random())
        assert pause is not None
        remaining = deadline.remaining_seconds()
        if remaining <= 0:
            raise DeadlineExceeded(
                f"expected a ready model at {where}; got none in time; check the address and the server's log, "
                "or wait longer: large weights take minutes to load"
            )
        yield Sleep(min(pause, remaining))
        attempt += 1
