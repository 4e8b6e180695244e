"""What a client is told: where the servers are, how to talk to them, and how much to ask at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TypeAlias

from nv_embed_client.addresses import places_of
from nv_embed_client.errors import InvalidInput
from nv_embed_client.retry import RetryPolicy
from nv_embed_client.transport import Transport

DEFAULT_URL = "localhost:8001"
DEFAULT_MODEL_NAME = "nv-embed-v2"
Headers: TypeAlias = Mapping[str, str]
_DEFAULT_RETRY = RetryPolicy()


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
            self.read(name)

    def read(self, name: str) -> bytes | None:
        """The content of one of the files, None when the field of that name is None.

        Raises:
            InvalidInput: it cannot be read.
        """
        path: str | Path | None = getattr(self, name)
        if path is None:
            return None
        try:
            return Path(path).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise InvalidInput.of(
                expected=f"a file that can be read as {name}",
                got=f"{str(path)!r}: {getattr(error, 'strerror', error)}",
                remedy="correct the path, or the file's permissions",
            ) from None


@dataclass(frozen=True, eq=False)
class Connection:
    """Where the servers are and how to talk to them."""

    url: str = DEFAULT_URL
    """The server's gRPC address, host:port. Several, separated by commas, share the load; dns:///host:port stands for
    every server that the name has."""
    model_name: str = DEFAULT_MODEL_NAME
    """As Triton knows it."""
    tls: TLS | None = None
    """None for a connection in the clear; `TLS()` for one checked against the system's certificates."""
    headers: Headers | Callable[[], Headers] | None = field(default=None, repr=False)  # may hold keys
    """Sent with every request, names in lower case: for Triton's restricted protocols, or for a proxy. A function is
    called for each request, in the caller's thread or task: for a traceparent, or a token that expires."""

    def __post_init__(self) -> None:
        places_of(self.url)  # raises what is wrong
        if not self.model_name or "\0" in self.model_name:
            raise InvalidInput.of(
                expected="a model name that is not empty and has no NUL, because Triton would cut it there",
                got=repr(self.model_name),
                remedy="use the name that Triton lists",
            )
        if not callable(self.headers):
            object.__setattr__(self, "headers", dict(self.headers or {}))
            self.metadata()  # raises what is wrong

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The headers of a request that is sent now, as gRPC wants them.

        Raises:
            InvalidInput: gRPC would refuse one.
        """
        headers = self.headers() if callable(self.headers) else self.headers or {}
        for name, value in headers.items():
            # gRPC takes only bytes as the value of a name that ends in "-bin".
            if not re.fullmatch(r"[0-9a-z_.-]+", name) or name.endswith("-bin"):
                raise InvalidInput.of(
                    expected="header names of lower-case letters, digits, '-', '_' and '.', not ending in '-bin'",
                    got=repr(name),
                    remedy="correct it: gRPC allows no others for text",
                )
            if not re.fullmatch(r"[ -~]*", value):
                raise InvalidInput.of(
                    expected=f"a value of printable ASCII characters for the header {name!r}",
                    got="others",  # the value may be a key
                    remedy="take them out: often it is the line's end of a file that holds a key",
                )
        return tuple(headers.items())


@dataclass(frozen=True, eq=False)
class Settings(Connection):
    """The arguments of either client; connects on first use.

    Raises:
        InvalidInput: a setting makes no sense.
    """

    _: KW_ONLY
    request_timeout: float = 120.0
    """Seconds for one request, its retries included. A call of many texts is many requests; its own `timeout` bounds
    all of it."""
    max_in_flight: int = 4
    """Requests of one call that may be on their way at the same time."""
    max_texts_per_request: int = 256
    """No request of a call has more."""
    max_bytes_per_request: int = 256 * 2**10
    """Of UTF-8, the instruction counted once for each text; a longer text goes alone. The default is about the largest
    batch that a server computes at once. More gains nothing, because the server merges requests, and a slow device may
    need longer than `request_timeout`."""
    retry: RetryPolicy = _DEFAULT_RETRY
    """When to try again what a busy, stopping or absent server refused."""
    transport: Transport | None = field(default=None, repr=False)
    """What carries the requests; None for gRPC to `url`. The client closes it. Tests use `MockTransport`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("request_timeout", "max_in_flight", "max_texts_per_request", "max_bytes_per_request"):
            if not getattr(self, name) > 0:
                raise InvalidInput.of(
                    expected=f"{name} of more than 0", got=str(getattr(self, name)), remedy="correct it"
                )
