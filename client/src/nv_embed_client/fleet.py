"""Which of several servers gets the next request; knows no network and no clock."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from nv_embed_client.errors import Unavailable
from nv_embed_client.model_info import ModelInfo

S = TypeVar("S")

_REST_SECONDS = 1.0
# So much more on their way than another server has: it hangs, or is far slower. Below that each gets its turn, because
# how many are on their way to equal servers differs by chance.
_MANY_TIMES, _MANY = 8, 32
_LOYALTY_SECONDS = 5.0  # less than a request is tried for
_TRUST_SECONDS = 2.0  # less than a server needs to come back with another model

logger = logging.getLogger("nv_embed_client")


@dataclass(eq=False)
class _Standing:
    """What is known of one server."""

    label: str
    is_good: bool = False  # may get requests
    is_asked: bool = False  # a question is on its way to it
    rests_until: float = 0.0  # before that it is not asked, unless nobody else is good
    reason: Exception | None = None  # why it is not good
    fingerprint: str | None = None  # of the model that it had when it was asked
    left_at: float = 0.0  # when it was last no longer good
    num_on_their_way: int = 0
    last_chosen: int = 0
    heard_at: float = 0.0  # when it last answered, or a request to it ended otherwise

    def may_have_changed(self, now: float) -> bool:
        """Whether it may have gone and come back without a request that noticed."""
        return self.is_good and not self.num_on_their_way and self.heard_at + _TRUST_SECONDS < now


class Fleet(Generic[S]):
    """The servers of one client. Its owner guards it with a lock.

    Requests go to the good servers in turn, so each gets the same number. One that keeps very many more of them waiting
    than another is passed over, so that it does not hold up everybody.

    A server becomes good when it answers the question what its model is. It stays so until it refuses a request. Then
    it rests, is asked again, and so on. One that nobody has heard of for a while is asked before its next request.

    All servers must have the same model, because vectors of two models cannot be compared. One with another model
    than the first good server is left out while a server with that model is good, or has just been.
    """

    def __init__(self, *, has_choice: bool) -> None:
        """
        Args:
            has_choice: False: there is one server for ever. It gets everything, and is asked nothing.
        """
        self._has_choice = has_choice
        self._standings: dict[S, _Standing] = {}
        self._fingerprint: str | None = None
        self._num_chosen = 0

    def __len__(self) -> int:
        return len(self._standings)

    def replace(self, servers: Iterable[tuple[S, str]]) -> None:
        """Have these servers and no others. What is known of those that stay is kept.

        Args:
            servers: each with what messages call it.
        """
        known = self._standings
        self._standings = {server: known.get(server) or _Standing(label) for server, label in servers}

    def to_ask(self, now: float, *, urgently: bool) -> list[S]:
        """The servers to ask now what their model is; each is waited for until `told` or `refused`.

        Args:
            now: in seconds.
            urgently: a request waits, so if no server is good, those that rest are asked too.
        """
        if not self._has_choice:
            return []
        if urgently:
            for standing in self._standings.values():
                if standing.may_have_changed(now):
                    standing.is_good, standing.left_at = False, now
        eager = urgently and not any(standing.is_good for standing in self._standings.values())
        asked = [
            server
            for server, standing in self._standings.items()
            if not standing.is_good and not standing.is_asked and (eager or standing.rests_until <= now)
        ]
        for server in asked:
            self._standings[server].is_asked = True
        return asked

    def choose(self, without: Collection[S]) -> S | None:
        """The server for the next request, which counts as on its way until `ended`; None: there is none now.

        Args:
            without: servers that are out of question.
        """
        possible = [
            (server, standing)
            for server, standing in self._standings.items()
            if (standing.is_good or not self._has_choice) and server not in without
        ]
        if not possible:
            return None
        least = min(standing.num_on_their_way for _, standing in possible)
        most = _MANY_TIMES * least + _MANY
        server, standing = min(
            ((server, standing) for server, standing in possible if standing.num_on_their_way <= most),
            key=lambda each: each[1].last_chosen,
        )
        self._num_chosen += 1
        standing.last_chosen = self._num_chosen
        standing.num_on_their_way += 1
        return server

    def may_become_good(self, without: Collection[S]) -> bool:
        """Whether a server that is not good is being asked."""
        return any(standing.is_asked and server not in without for server, standing in self._standings.items())

    def ended(self, server: S, now: float) -> None:
        """A request is no longer on its way to the server."""
        if (standing := self._standings.get(server)) is not None:
            standing.num_on_their_way -= 1
            standing.heard_at = now

    def refused(self, server: S, error: Exception, now: float) -> None:
        """The server refused a request, or did not answer what its model is: it rests."""
        if (standing := self._standings.get(server)) is not None:
            if standing.is_good:
                standing.left_at = now
            standing.is_good = standing.is_asked = False
            standing.rests_until = now + _REST_SECONDS
            standing.reason = error

    def told(self, server: S, info: ModelInfo | None, now: float) -> None:
        """The server answered what its model is; None: it is too old to say."""
        if (standing := self._standings.get(server)) is None:
            return
        fingerprint = None if info is None else info.fingerprint
        is_news, standing.fingerprint = fingerprint != standing.fingerprint, fingerprint
        others = [
            other.label
            for other in self._standings.values()
            if other.fingerprint == self._fingerprint and (other.is_good or other.left_at + _LOYALTY_SECONDS > now)
        ]
        if None not in (fingerprint, self._fingerprint) and fingerprint != self._fingerprint and others:
            error = Unavailable(
                f"expected the same model on all servers, so fingerprint {self._fingerprint} as on {others[0]}; got "
                f"{fingerprint} on {standing.label}; serve one of the models elsewhere, or under another name"
            )
            if is_news:
                logger.warning("%s is left out: %s", standing.label, error)
            self.refused(server, error, now)
            return
        if None not in (fingerprint, self._fingerprint) and fingerprint != self._fingerprint:
            logger.warning("the model changes from fingerprint %s to %s", self._fingerprint, fingerprint)
        self._fingerprint = fingerprint or self._fingerprint
        standing.is_good, standing.is_asked, standing.reason, standing.heard_at = True, False, None, now

    def reason(self) -> Exception | None:
        """Why no server is good: what waiting may mend, if there is that. None: nothing is known."""
        reasons = [standing.reason for standing in self._standings.values() if standing.reason is not None]
        return min(reasons, key=lambda reason: not isinstance(reason, Unavailable), default=None)

    def due_seconds(self, now: float) -> float | None:
        """When `to_ask` has something again; None: never."""
        if not self._has_choice:
            return None
        waits = [s.rests_until - now for s in self._standings.values() if not s.is_good and not s.is_asked]
        return max(0.0, min(waits)) if waits else None
