"""What a client is told: where the server is, how to talk to it, and how much to ask of it at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from nv_embed_client.errors import InvalidInput
from nv_embed_client.retry import RetryPolicy
from nv_embed_client.transport import Transport

DEFAULT_URL = "localhost:8001"
DEFAULT_MODEL_NAME = "nv-embed-v2"
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
    """Where the server is and how to talk to it."""

    url: str = DEFAULT_URL
    """The server's gRPC address, host:port."""
    model_name: str = DEFAULT_MODEL_NAME
    """As Triton knows it."""
    tls: TLS | None = None
    """None for a connection in the clear; `TLS()` for one checked against the system's certificates."""
    headers: Mapping[str, str] | None = field(default=None, repr=False)  # may hold keys
    """Sent with every request, names in lower case: for Triton's restricted protocols, or for a proxy."""

    def __post_init__(self) -> None:
        # Neither a space nor a comma. gRPC would take a larger port modulo 65,536.
        address = re.fullmatch(r"unix:[!-+\--~]+|[!-+\--~]+:([0-9]{1,5})", self.url)
        if "//" in self.url or not address or (address[1] and not 0 < int(address[1]) < 2**16):
            raise InvalidInput.of(
                expected="the gRPC address of one server as host:port",
                got=repr(self.url),
                remedy="leave out the scheme, and use Triton's gRPC port, by default 8001",
            )
        if not self.model_name or "\0" in self.model_name:
            raise InvalidInput.of(
                expected="a model name that is not empty and has no NUL, because Triton would cut it there",
                got=repr(self.model_name),
                remedy="use the name that Triton lists",
            )
        object.__setattr__(self, "headers", dict(self.headers or {}))
        for name, value in (self.headers or {}).items():
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
