"""The transport that speaks gRPC to one Triton or to several.

It uses gRPC's thread-based channels for the async client too, because asyncio channels do not survive a fork: in a
child of a process that has one open, new ones hang or crash.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tritonclient.grpc import service_pb2

from nv_embed_client.addresses import Address, Name, places_of
from nv_embed_client.errors import ServerTooOld, Unavailable
from nv_embed_client.fleet import Fleet
from nv_embed_client.line import Metadata, Sent
from nv_embed_client.model_info import ModelInfo
from nv_embed_client.server import SILENCE_SECONDS, Server, closed
from nv_embed_client.transport import Transport
from nv_embed_client.wire import EmbedRequest, EmbedResult, error_of, model_info_message, model_info_of

if TYPE_CHECKING:
    from nv_embed_client.connection import Connection

_QUESTION_SECONDS = 5.0  # for a server to say what its model is, connecting included
_LOOK_UP_SECONDS = 5.0  # between two look-ups of a name that is in use, so that a server that joins is found
_SOON_SECONDS = 1.0  # the same after a failure


class GrpcTransport(Transport):
    """Connects on first use, and anew in each process that uses it.

    With several servers, each request goes to one of them, see `Fleet`. One that a server refuses goes on at once to
    the next good server, so it fails only when all have refused it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._places = places_of(connection.url)
        self._metadata: Metadata = ()  # of the latest request; questions have the same
        self._closed = False
        self._forget_inherited()

    def embed(self, request: EmbedRequest, timeout_seconds: float) -> Future[EmbedResult]:
        """Send a request; the future ends within `timeout_seconds`."""
        return self._send("ModelInfer", request.message(self._connection.model_name), request.result, timeout_seconds)

    def is_ready(self, timeout_seconds: float) -> Future[bool]:
        """Ask whether the model is ready on a server; the future ends within `timeout_seconds`."""
        message = service_pb2.ModelReadyRequest(name=self._connection.model_name)
        return self._send("ModelReady", message, lambda reply: bool(reply.ready), timeout_seconds)

    def model_info(self, timeout_seconds: float) -> Future[ModelInfo | None]:
        """Ask a server what the model is; the future ends within `timeout_seconds`."""
        return self._send("ModelInfer", model_info_message(self._connection.model_name), model_info_of, timeout_seconds)

    def for_model(self, model_name: str) -> Transport:
        """A transport to another model of the same servers, over the connections of this one, which closes them.

        Raises:
            InvalidInput: the name makes no sense.
        """
        return _SharedTransport(self, model_name)

    def check(self) -> float | None:
        """Look after the connections, the servers and what waits for one. Seconds until that is due again."""
        if self._pid != os.getpid():
            self._forget_inherited()
        self._look_around(urgently=False)
        now = time.monotonic()
        with self._lock:
            servers = list(self._servers)
            late = [sent for sent in self._waiting if sent.until <= now]
            for sent in late:
                self._waiting.remove(sent)
            dues = [sent.until - now for sent in self._waiting]
            if (due := self._fleet.due_seconds(now)) is not None:
                dues.append(due)
        for sent in late:
            _end(sent, None, error_of("DEADLINE_EXCEEDED", ""))
        return min([SILENCE_SECONDS, *dues, *(server.check() for server in servers)])

    def close(self) -> None:
        """End the connections and what is on its way over them."""
        self._closed = True
        # Closing an inherited channel would wait for threads that only the parent has.
        if self._pid != os.getpid():
            self._forget_inherited()
        with self._lock:
            servers = list(self._servers)
        for server in servers:
            server.close()
        self._dispatch()

    def _forget_inherited(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()  # guards all below
        has_names = any(isinstance(place, Name) for place in self._places)
        self._fleet: Fleet[Server] = Fleet(has_choice=has_names or len(self._places) > 1)
        self._by_place: dict[Address | Name, dict[Address, Server]] = {}
        # Also those that a name no longer stands for: requests may be on their way to them.
        self._servers: weakref.WeakSet[Server] = weakref.WeakSet()
        self._waiting: list[Sent] = []  # until it is known where to
        self._is_looking_up = False
        self._looked_up_at = 0.0
        self._look_up_error: Unavailable | None = None
        self._found({place: [place] for place in self._places if isinstance(place, Address)}, None)
        self._look_up_at = 0.0  # at once, if there are names

    def _send(self, method: str, message: Any, read: Callable[[Any], Any], timeout_seconds: float) -> Future[Any]:
        if self._pid != os.getpid():
            self._forget_inherited()
        now = time.monotonic()
        self._metadata = self._connection.metadata()
        sent = Sent(method, message, read, self._metadata, now, now + timeout_seconds, self._ended)
        self._look_around(urgently=True)
        with self._lock:
            self._waiting.append(sent)
        self._dispatch()
        return sent.future

    def _dispatch(self) -> None:
        """Send what waits, unless it is about to be known where to."""
        starts: list[tuple[Server, Sent]] = []
        ends: list[tuple[Sent, Exception]] = []
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
            for sent in waiting:
                if sent.future.cancelled():
                    continue
                if self._closed:
                    ends.append((sent, closed()))
                elif (server := self._fleet.choose(sent.refused_by)) is not None:
                    starts.append((server, sent))
                elif self._fleet.may_become_good(sent.refused_by) or (self._is_looking_up and not sent.refused_by):
                    self._waiting.append(sent)
                else:
                    error = next(reversed(sent.refused_by.values()), None) or self._fleet.reason()
                    ends.append((sent, error or self._look_up_error or _nobody()))
        for server, sent in starts:
            server.start(sent)
        for sent, error in ends:
            _end(sent, None, error)

    def _ended(self, server: Server, sent: Sent, value: Any, error: Exception | None) -> None:
        """A server is done with a request; runs in any thread."""
        now = time.monotonic()
        goes_on = isinstance(error, Unavailable) and not sent.future.cancelled() and not self._closed
        with self._lock:
            self._fleet.ended(server, now)
            if error is not None and (goes_on or sent.unheard):
                self._fleet.refused(server, error, now)
                self._look_up_at = min(self._look_up_at, self._looked_up_at + _SOON_SECONDS)
            if error is not None and goes_on:
                sent.refused_by[server] = error
                self._waiting.append(sent)
        if goes_on:
            self._dispatch()
        else:
            _end(sent, value, error)

    def _look_around(self, *, urgently: bool) -> None:
        """Look names up and ask servers whether they are good, if that is due."""
        now = time.monotonic()
        with self._lock:
            looks_up = now >= self._look_up_at and not self._is_looking_up and not self._closed
            looks_up = looks_up and any(isinstance(place, Name) for place in self._places)
            self._is_looking_up = self._is_looking_up or looks_up
        if looks_up:
            # The resolver cannot be given up, so nobody waits for this thread when the process ends.
            threading.Thread(target=self._look_up, args=(self._pid,), name="nv-embed look-up", daemon=True).start()
        self._ask(urgently=urgently)

    def _ask(self, *, urgently: bool) -> None:
        """Ask those that are not known to be good what their model is."""
        now = time.monotonic()
        with self._lock:
            asked = [] if self._closed else self._fleet.to_ask(now, urgently=urgently)
        for server in asked:
            message = model_info_message(self._connection.model_name)
            until = now + _QUESTION_SECONDS
            server.start(Sent("ModelInfer", message, model_info_of, self._metadata, now, until, self._told))

    def _told(self, server: Server, _: Sent, info: ModelInfo | None, error: Exception | None) -> None:
        """A server has said what its model is, or has not; runs in any thread."""
        with self._lock:
            if error is None or isinstance(error, ServerTooOld):
                self._fleet.told(server, info, time.monotonic())
            else:
                self._fleet.refused(server, error, time.monotonic())
        self._dispatch()

    def _silent(self, server: Server) -> None:
        """A server gives no sign of life; runs in any thread."""
        with self._lock:
            others = len(self._fleet) > 1
        if others:
            server.give_up(
                Unavailable("expected a sign of life while requests wait; got none; look after the server or its host")
            )

    def _look_up(self, pid: int) -> None:
        found: dict[Address | Name, list[Address]] = {}
        error, url = None, self._connection.url
        for place in self._places:
            try:
                found[place] = place.servers() if isinstance(place, Name) else [place]
            except OSError as failed:
                reason = failed.strerror or failed
                error = Unavailable(f"expected servers behind the name of {url!r}; got: {reason}; check the name")
        if pid != os.getpid() or pid != self._pid:  # forked meanwhile: another look-up is under way
            return
        self._found(found, error)
        self._ask(urgently=True)
        self._dispatch()

    def _found(self, found: dict[Address | Name, list[Address]], error: Unavailable | None) -> None:
        """Have these servers. Those of a name that could not be looked up stay."""
        with self._lock:
            for place, addresses in found.items():
                known = self._by_place.get(place, {})
                self._by_place[place] = {
                    address: known.get(address) or Server(address, self._connection, self._silent)
                    for address in addresses
                }
            servers = {address.target: server for known in self._by_place.values() for address, server in known.items()}
            self._servers.update(servers.values())
            self._fleet.replace((server, server.address.target) for server in servers.values())
            self._is_looking_up = False
            self._looked_up_at = time.monotonic()
            self._look_up_at = self._looked_up_at + (_LOOK_UP_SECONDS if error is None else _SOON_SECONDS)
            self._look_up_error = error


class _SharedTransport(GrpcTransport):
    """Another model, over the connections of `owner`."""

    def __init__(self, owner: GrpcTransport, model_name: str) -> None:
        self._connection = replace(owner._connection, model_name=model_name)
        self._owner = owner

    def _send(self, method: str, message: Any, read: Callable[[Any], Any], timeout_seconds: float) -> Future[Any]:
        return self._owner._send(method, message, read, timeout_seconds)

    def check(self) -> float | None:
        return self._owner.check()

    def close(self) -> None:
        """The owner does."""


def _end(sent: Sent, value: Any, error: Exception | None) -> None:
    if sent.future.set_running_or_notify_cancel():
        if error is None:
            sent.future.set_result(value)
        else:
            sent.future.set_exception(error)


def _nobody() -> Unavailable:
    return Unavailable("expected a server; got none; check the address")
