"""How to reach a server: address, TLS, headers and channel settings, the same for both clients."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nv_embed_client.errors import InvalidInput

# Setting any channel argument replaces tritonclient's own, so its 2 GiB limits are repeated here: gRPC's default
# of 4 MiB is 255 rows of 4096.
_MAX_MESSAGE_BYTES = 2**31 - 1
_CHANNEL_ARGUMENTS = (
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # gRPC's default grows to two minutes between attempts to connect: long after a restarted server is back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Despite its name how long an attempt to connect may take, TLS included; after a refusal it delays nothing.
    ("grpc.min_reconnect_backoff_ms", 5000),
)


@dataclass(frozen=True, slots=True)
class TLS:
    """Certificates in PEM files. Without any, the server is checked against the certificates of the system."""

    root_certificates: str | Path | None = None
    """The authorities that may have signed the server's certificate."""
    private_key: str | Path | None = None
    """With `certificate_chain`: what this client identifies itself by (mutual TLS)."""
    certificate_chain: str | Path | None = None

    def __post_init__(self) -> None:
        if (self.private_key is None) != (self.certificate_chain is None):
            raise InvalidInput.of(
                expected="both private_key and certificate_chain, or neither", got="one of them", remedy="add the other"
            )
        for name in ("root_certificates", "private_key", "certificate_chain"):
            if (path := getattr(self, name)) is not None:
                try:
                    Path(path).open("rb").close()
                except OSError as error:
                    raise InvalidInput.of(
                        expected=f"a file that can be read as {name}",
                        got=f"{str(path)!r}: {error.strerror}",
                        remedy="correct the path, or the file's permissions",
                    ) from None


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the server is and how to talk to it."""

    url: str
    model_name: str
    tls: TLS | None
    headers: Mapping[str, str] = field(repr=False)  # may hold keys

    def __post_init__(self) -> None:
        if "//" in self.url or ":" not in self.url:
            raise InvalidInput.of(
                expected="the gRPC address of a server as host:port",
                got=repr(self.url),
                remedy="leave out the scheme, and use Triton's gRPC port, by default 8001",
            )
        for name, value in self.headers.items():
            if not re.fullmatch(r"[0-9a-z_.-]+", name):
                raise InvalidInput.of(
                    expected="header names of lower-case letters, digits, '-', '_' and '.', as gRPC has them",
                    got=repr(name),
                    remedy="correct it",
                )
            if not re.fullmatch(r"[ -~]*", value):
                raise InvalidInput.of(
                    expected=f"a value of printable ASCII characters for the header {name!r}",
                    got="others",  # the value may be a key
                    remedy="take them out: often it is the line's end of a file that holds a key",
                )

    def client_arguments(self) -> dict[str, Any]:
        """Keyword arguments of either `InferenceServerClient`."""
        arguments: dict[str, Any] = {"url": self.url, "channel_args": list(_CHANNEL_ARGUMENTS)}
        if self.tls is not None:
            arguments["ssl"] = True
            for name in ("root_certificates", "private_key", "certificate_chain"):
                path = getattr(self.tls, name)
                arguments[name] = None if path is None else str(path)
        return arguments
