"""The transport that speaks gRPC to Triton.

It uses gRPC's thread-based channels for the async client too, because asyncio channels do not survive a fork: in a
child of a process that has one open, new ones hang or crash.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from nv_embed_client.errors import AccessDenied, DeadlineExceeded, NVEmbedError, Unavailable
from nv_embed_client.model_info import ModelInfo
from nv_embed_client.proxy import proxy_hint
from nv_embed_client.transport import Transport
from nv_embed_client.wire import EmbedRequest, EmbedResult, error_of, model_info_message, model_info_of

if TYPE_CHECKING:
    from nv_embed_client.connection import Connection

_MAX_MESSAGE_BYTES = 2**31 - 1  # gRPC's default of 4 MiB is 255 rows of 4096
_CHANNEL_ARGUMENTS = (
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # gRPC's default grows to two minutes between attempts to connect: long after a restarted server is back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Despite its name, this is how long an attempt to connect may take, TLS included. A refusal is not delayed by it.
    ("grpc.min_reconnect_backoff_ms", 5000),
    # Otherwise gRPC gives a new channel the connection of an old one, even a dead one.
    ("grpc.use_local_subchannel_pool", 1),
)
# A connection that has been silent for this long is asked for a sign of life, by a small request. HTTP/2's pings would
# do the same, but a server with default settings ends a connection that pings too often, and all requests on it.
_SILENCE_SECONDS = 3.0
_SIGN_SECONDS = 2.0  # a server that takes longer for it is asked over a new connection too


class _Sign(Enum):
    LIFE = auto()  # the server answered
    NONE = auto()  # nothing came
    ENDED = auto()  # gRPC itself says that the connection has ended, or never began


@dataclass(eq=False)
class _Sent:
    """A request on its way."""

    method: str
    message: Any
    read: Callable[[Any], Any]
    begun: float
    until: float
    future: Future[Any] = field(default_factory=Future)


class _Line:
    """One channel, and what is on its way over it."""

    def __init__(self, connection: Connection) -> None:
        tls, options = connection.tls, list(_CHANNEL_ARGUMENTS)
        if tls is None:
            self.channel = grpc.insecure_channel(connection.url, options)
        else:
            credentials = grpc.ssl_channel_credentials(
                tls.read("root_certificates"), tls.read("private_key"), tls.read("certificate_chain")
            )
            self.channel = grpc.secure_channel(connection.url, credentials, options)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.proxy_hint = proxy_hint(connection.url)  # gRPC, too, reads the environment now
        self.last_sign = time.monotonic()
        self.in_doubt = False
        self.calls: dict[_Sent, Any] = {}


class GrpcTransport(Transport):
    """Connects on first use, anew in each process that uses it, and anew when a connection is found dead.

    Load balancers, NATs and nodes forget connections without telling anybody. So a connection that is silent while
    requests wait is asked for a sign of life. If it gives none and a new connection does, the requests move there. A
    request that ends by its deadline on a connection that was silent all the time also has the next one begin anew.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._metadata = tuple((connection.headers or {}).items())
        self._closed = False
        self._line: _Line | None  # that new requests take
        self._forget_inherited()

    def embed(self, request: EmbedRequest, timeout_seconds: float) -> Future[EmbedResult]:
        """Send a request; the future ends within `timeout_seconds`."""
        return self._send("ModelInfer", request.message(self._connection.model_name), request.result, timeout_seconds)

    def is_ready(self, timeout_seconds: float) -> Future[bool]:
        """Ask whether the model is ready; the future ends within `timeout_seconds`."""
        message = service_pb2.ModelReadyRequest(name=self._connection.model_name)
        return self._send("ModelReady", message, lambda reply: bool(reply.ready), timeout_seconds)

    def model_info(self, timeout_seconds: float) -> Future[ModelInfo | None]:
        """Ask what the model is; the future ends within `timeout_seconds`."""
        return self._send("ModelInfer", model_info_message(self._connection.model_name), model_info_of, timeout_seconds)

    def for_model(self, model_name: str) -> Transport:
        """A transport to another model of the same server, over the connections of this one, which closes them.

        Raises:
            InvalidInput: the name makes no sense.
        """
        return _SharedTransport(self, model_name)

    def check(self) -> float | None:
        """Doubt each connection that is silent while requests wait on it. Seconds until the next is due."""
        if self._pid != os.getpid():
            self._forget_inherited()
        with self._lock:
            lines = [line for line in self._lines if line.calls and not line.in_doubt]
        seconds, now = _SILENCE_SECONDS, time.monotonic()
        for line in lines:
            due = line.last_sign + _SILENCE_SECONDS - now
            if due > 0:
                seconds = min(seconds, due)
            else:
                line.in_doubt = True
                self._ask_for_a_sign(line, partial(self._doubt, line))
        return seconds

    def close(self) -> None:
        """End the connection and what is on its way over it."""
        self._closed = True
        # Closing an inherited channel would wait for threads that only the parent has.
        if self._pid != os.getpid():
            self._forget_inherited()
        with self._lock:
            self._line = None
            lines = list(self._lines)
        for line in lines:
            line.channel.close()

    def _forget_inherited(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._line = None
        # Older ones too: a request may wait on one that another request has given up.
        self._lines: weakref.WeakSet[_Line] = weakref.WeakSet()

    def _send(self, method: str, message: Any, read: Callable[[Any], Any], timeout_seconds: float) -> Future[Any]:
        if self._pid != os.getpid():
            self._forget_inherited()
        now = time.monotonic()
        sent = _Sent(method, message, read, now, now + timeout_seconds)
        with self._lock:
            if self._line is None and not self._closed:
                self._line = _Line(self._connection)
                self._lines.add(self._line)
            line = self._line
        if line is None:
            sent.future.set_exception(_closed())
        else:
            self._start(sent, line)
        return sent.future

    def _start(self, sent: _Sent, line: _Line) -> None:
        method = getattr(line.stub, sent.method)
        try:
            call: Any = method.future(sent.message, timeout=sent.until - time.monotonic(), metadata=self._metadata)
        except ValueError:  # the channel was closed meanwhile
            if sent.future.set_running_or_notify_cancel():
                sent.future.set_exception(_closed())
            return
        line.calls[sent] = call
        sent.future.add_done_callback(lambda future: call.cancel() if future.cancelled() else None)
        call.add_done_callback(lambda ended: self._ended(sent, line, ended))

    def _ended(self, sent: _Sent, line: _Line, call: Any) -> None:
        """Runs in a thread of gRPC's."""
        if line.calls.pop(sent, None) is None:  # it has moved
            return
        code = call.code().name
        if _is_a_sign(code):
            line.last_sign = time.monotonic()
        elif code == "DEADLINE_EXCEEDED" and line.last_sign <= sent.begun:
            self._retire(line)
        if not sent.future.set_running_or_notify_cancel():
            return
        try:
            if code != "OK":
                raise self._error_of(code, call.details() or "", line)
            sent.future.set_result(sent.read(call.result()))
        except Exception as error:
            sent.future.set_exception(error)

    def _ask_for_a_sign(self, line: _Line, asked: Callable[[_Sign], None]) -> None:
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

    def _trust(self, line: _Line) -> None:
        line.last_sign = time.monotonic()
        line.in_doubt = False

    def _doubt(self, line: _Line, sign: _Sign) -> None:
        if sign is _Sign.NONE:
            self._compare(line)
        else:
            self._trust(line)

    def _compare(self, line: _Line) -> None:
        """`line` gave no sign. If a new one does and `line`, asked again after that, does not, move to the new one."""
        try:
            fresh = _Line(self._connection)
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
            else:  # the server answers nobody: a new line does not help
                self._trust(line)

        self._ask_for_a_sign(fresh, asked_fresh)

    def _move(self, line: _Line, fresh: _Line) -> None:
        self._retire(line, fresh)
        for sent, call in list(line.calls.items()):
            if line.calls.pop(sent, None) is call:
                call.cancel()
                self._start(sent, fresh)

    def _retire(self, line: _Line, successor: _Line | None = None) -> None:
        """Begin nothing more over `line`. What is on its way stays there, and the channel ends with the last of it."""
        with self._lock:
            if self._line is line:
                self._line = None if self._closed else successor

    @staticmethod
    def _error_of(code: str, details: str, line: _Line) -> NVEmbedError:
        error = error_of(code, details)
        if line.proxy_hint is not None and isinstance(error, Unavailable | DeadlineExceeded):
            return type(error)(f"{error}; {line.proxy_hint}")
        return error


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


def _closed() -> Unavailable:
    return Unavailable("expected an open connection; got one that was closed; make a new transport")


def _is_a_sign(code: str) -> bool:
    """Whether this code shows that the connection lives. gRPC itself also gives the others."""
    return code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")
