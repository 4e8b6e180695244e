"""One server: the connections to it, and what is on its way over them."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Any

from tritonclient.grpc import service_pb2

from nv_embed_client.addresses import Address
from nv_embed_client.errors import AccessDenied, DeadlineExceeded, NVEmbedError, Unavailable
from nv_embed_client.line import Line, Metadata, Sent
from nv_embed_client.wire import error_of

if TYPE_CHECKING:
    from nv_embed_client.connection import Connection

# A connection that has been silent for this long is asked for a sign of life, by a small request. HTTP/2's pings would
# do the same, but a server with default settings ends a connection that pings too often, and all requests on it.
SILENCE_SECONDS = 3.0
_SIGN_SECONDS = 2.0  # a server that takes longer for it is asked over a new connection too


class _Sign(Enum):
    LIFE = auto()  # the server answered
    NONE = auto()  # nothing came
    ENDED = auto()  # gRPC itself says that the connection has ended, or never began


class Server:
    """Connects on first use, and anew when its connection is found dead.

    Load balancers, NATs and nodes forget connections without telling anybody. So a connection that is silent while
    requests wait is asked for a sign of life. If it gives none and a new connection does, the requests move there. A
    request that ends by its deadline on a connection that was silent all the time also has the next one begin anew.
    """

    def __init__(self, address: Address, connection: Connection, silent: Callable[[Server], None]) -> None:
        """
        Args:
            address: where it is.
            connection: how to talk to it.
            silent: called, in any thread, when neither an old nor a new connection gives a sign of life.
        """
        self.address = address
        self._connection = connection
        self._silent = silent
        self._metadata: Metadata = ()
        self._lock = threading.Lock()
        self._closed = False
        self._line: Line | None = None  # that new requests take
        # Older ones too: a request may wait on one that another request has given up.
        self._lines: weakref.WeakSet[Line] = weakref.WeakSet()

    def start(self, sent: Sent) -> None:
        """Send a request."""
        self._metadata = sent.metadata
        try:
            with self._lock:
                if self._line is None and not self._closed:
                    self._line = Line(self.address, self._connection)
                    self._lines.add(self._line)
                line = self._line
        except NVEmbedError as error:  # a certificate is gone
            sent.ended(self, sent, None, error)
            return
        if line is None:
            sent.ended(self, sent, None, closed())
        else:
            self._start(sent, line)

    def check(self) -> float:
        """Doubt each connection that is silent while requests wait on it. Seconds until the next is due."""
        with self._lock:
            lines = [line for line in self._lines if line.calls and not line.in_doubt]
        seconds, now = SILENCE_SECONDS, time.monotonic()
        for line in lines:
            due = line.last_sign + SILENCE_SECONDS - now
            if due > 0:
                seconds = min(seconds, due)
            else:
                line.in_doubt = True
                self._ask_for_a_sign(line, partial(self._doubt, line))
        return seconds

    def give_up(self, error: NVEmbedError) -> None:
        """End what is on its way with an error, and begin anew with the next request."""
        with self._lock:
            self._line = None
            lines = list(self._lines)
        for line in lines:
            for sent, call in list(line.calls.items()):
                if line.calls.pop(sent, None) is call:
                    call.cancel()
                    sent.ended(self, sent, None, error)

    def close(self) -> None:
        """End the connections and what is on its way over them."""
        with self._lock:
            self._closed = True
            self._line = None
            lines = list(self._lines)
        for line in lines:
            line.channel.close()

    def _start(self, sent: Sent, line: Line) -> None:
        method = getattr(line.stub, sent.method)
        try:
            call: Any = method.future(sent.message, timeout=sent.until - time.monotonic(), metadata=sent.metadata)
        except ValueError:  # the channel was closed meanwhile
            sent.ended(self, sent, None, closed())
            return
        line.calls[sent] = call
        sent.future.add_done_callback(lambda future: call.cancel() if future.cancelled() else None)
        call.add_done_callback(lambda ended: self._ended(sent, line, ended))

    def _ended(self, sent: Sent, line: Line, call: Any) -> None:
        """Runs in a thread of gRPC's."""
        if line.calls.pop(sent, None) is None:  # it has moved
            return
        code = call.code().name
        if _is_a_sign(code):
            line.last_sign = time.monotonic()
        elif code == "DEADLINE_EXCEEDED" and line.last_sign <= sent.begun:
            self._retire(line)
            sent.unheard = True
        value, error = None, None
        try:
            if code != "OK":
                raise self._error_of(code, call.details() or "", line)
            value = None if sent.future.cancelled() else sent.read(call.result())
        except Exception as raised:
            error = raised
        sent.ended(self, sent, value, error)

    def _ask_for_a_sign(self, line: Line, asked: Callable[[_Sign], None]) -> None:
        """Ask over `line` whether the server lives; `asked` is called with what came, in a thread of gRPC's."""

        def ended(call: Any) -> None:
            code = call.code().name
            # A server that restricts this question answers UNAVAILABLE, and so does gRPC if there is no server.
            if _is_a_sign(code) or isinstance(error_of(code, call.details() or ""), AccessDenied):
                asked(_Sign.LIFE)
            else:
                asked(_Sign.NONE if code == "DEADLINE_EXCEEDED" else _Sign.ENDED)

        with contextlib.suppress(ValueError):  # closed meanwhile
            call = line.stub.ServerLive.future(
                service_pb2.ServerLiveRequest(), timeout=_SIGN_SECONDS, metadata=self._metadata
            )
            call.add_done_callback(ended)

    def _trust(self, line: Line) -> None:
        line.last_sign = time.monotonic()
        line.in_doubt = False

    def _doubt(self, line: Line, sign: _Sign) -> None:
        if sign is _Sign.NONE:
            self._compare(line)
        else:
            self._trust(line)

    def _compare(self, line: Line) -> None:
        """`line` gave no sign. If a new one does and `line`, asked again after that, does not, move to the new one."""
        try:
            fresh = Line(self.address, self._connection)
        except NVEmbedError:  # a certificate is gone
            self._trust(line)
            return
        with self._lock:
            self._lines.add(fresh)

        def asked_again(sign: _Sign) -> None:
            if sign is _Sign.NONE:
                self._move(line, fresh)
            else:
                self._trust(line)

        def asked_fresh(sign: _Sign) -> None:
            if sign is _Sign.LIFE:
                self._ask_for_a_sign(line, asked_again)
            else:  # the server answers nobody: a new line does not help, but another server may
                self._trust(line)
                self._silent(self)

        self._ask_for_a_sign(fresh, asked_fresh)

    def _move(self, line: Line, fresh: Line) -> None:
        self._retire(line, fresh)
        for sent, call in list(line.calls.items()):
            if line.calls.pop(sent, None) is call:
                call.cancel()
                self._start(sent, fresh)
        line.in_doubt = False  # for a request that another thread gave to it meanwhile

    def _retire(self, line: Line, successor: Line | None = None) -> None:
        """Begin nothing more over `line`. What is on its way stays there, and the channel ends with the last of it."""
        with self._lock:
            if self._line is line:
                self._line = None if self._closed else successor

    @staticmethod
    def _error_of(code: str, details: str, line: Line) -> NVEmbedError:
        error = error_of(code, details)
        if line.proxy_hint is not None and isinstance(error, Unavailable | DeadlineExceeded):
            return type(error)(f"{error}; {line.proxy_hint}")
        return error


def closed() -> Unavailable:
    """What a request over a closed transport gets."""
    return Unavailable("expected an open connection; got one that was closed; make a new transport")


def _is_a_sign(code: str) -> bool:
    """Whether this code shows that the connection lives. gRPC itself also gives the others."""
    return code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")
