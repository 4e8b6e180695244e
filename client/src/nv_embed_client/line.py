"""One connection to a server, and what is on its way over it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
from tritonclient.grpc import service_pb2_grpc

from nv_embed_client.addresses import Address
from nv_embed_client.proxy import proxy_hint

if TYPE_CHECKING:
    from nv_embed_client.connection import Connection
    from nv_embed_client.server import Server

Metadata: TypeAlias = tuple[tuple[str, str], ...]


_MAX_MESSAGE_BYTES = 2**31 - 1  # gRPC's default of 4 MiB is 255 rows of 4096
_CHANNEL_ARGUMENTS = (
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # gRPC's default grows to two minutes between attempts to connect: long after a restarted server is back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Despite its name, this is how long an attempt to connect may take, TLS included. A refusal is not delayed by it.
    ("grpc.min_reconnect_backoff_ms", 5000),
    # A name may have moved when its server fails. gRPC's default asks for it at most twice a minute.
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    # Otherwise gRPC gives a new channel the connection of an old one, even a dead one.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(eq=False)
class Sent:
    """A request on its way."""

    method: str
    message: Any
    read: Callable[[Any], Any]
    metadata: Metadata
    begun: float
    until: float
    ended: Callable[[Server, Sent, Any, Exception | None], None]
    """Called once by each server that it was given to, in any thread, with the outcome: a value, or an error."""
    future: Future[Any] = field(default_factory=Future)
    refused_by: dict[Server, Exception] = field(default_factory=dict)
    unheard: bool = False
    """Whether it ended by its deadline while the server gave no sign of life at all."""


class Line:
    """One channel of gRPC's, with its own connection."""

    def __init__(self, address: Address, connection: Connection) -> None:
        tls = connection.tls
        options: list[tuple[str, str | int]] = list(_CHANNEL_ARGUMENTS)
        self.proxy_hint = proxy_hint(address.name or address.target)  # gRPC, too, reads the environment now
        if address.name is not None:  # of which gRPC would know nothing
            options.append(("grpc.default_authority", address.name))
            options.append(("grpc.enable_http_proxy", int(self.proxy_hint is not None)))
        if tls is None:
            self.channel = grpc.insecure_channel(address.target, options)
        else:
            credentials = grpc.ssl_channel_credentials(
                tls.read("root_certificates"), tls.read("private_key"), tls.read("certificate_chain")
            )
            self.channel = grpc.secure_channel(address.target, credentials, options)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.last_sign = time.monotonic()
        self.in_doubt = False
        self.calls: dict[Sent, Any] = {}
