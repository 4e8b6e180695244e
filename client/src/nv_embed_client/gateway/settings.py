"""What the operator of a gateway decides."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from nv_embed_client.connection import DEFAULT_MODEL_NAME, DEFAULT_URL, TLS, Connection
from nv_embed_client.errors import InvalidInput
from nv_embed_client.gateway.names import names_of

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]_-]+")


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Everything but where the gateway itself listens."""

    triton_url: str = DEFAULT_URL
    triton_tls: TLS | None = None
    triton_headers: dict[str, str] = field(default_factory=dict, repr=False)
    model_names: tuple[str, ...] = (DEFAULT_MODEL_NAME,)  # as Triton knows them; the first is the default
    api_key: str | None = field(default=None, repr=False)  # None: anybody may ask
    request_timeout_seconds: float = 60.0  # from the parsed request to the last vector
    max_body_bytes: int = 16 * 2**20
    max_inputs: int = 2048  # as the OpenAI API has it
    aliases: tuple[str, ...] = ()  # further names, as `names.names_of` reads them
    cors_origins: tuple[str, ...] = ()  # whose pages in a browser may ask; "*": all
    ignore_unknown_fields: bool = False  # of requests, instead of refusing them

    def __post_init__(self) -> None:
        names_of(self.model_names, self.aliases)  # raises what is wrong
        for name in self.model_names:
            self.connection(name)  # so does this
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise InvalidInput.of(
                    expected="an origin as browsers send it, scheme://host or scheme://host:port in lower case, or *",
                    got=ascii(origin)[:80],
                    remedy="leave out the path and the slash at the end",
                )
        for name in ("request_timeout_seconds", "max_body_bytes", "max_inputs"):
            if not getattr(self, name) > 0:
                raise InvalidInput.of(
                    expected=f"{name} of more than 0", got=str(getattr(self, name)), remedy="correct it"
                )
        if (key := self.api_key) is not None and not (
            key.isascii() and key.isprintable() and key and key == key.strip()
        ):
            raise InvalidInput.of(  # HTTP takes a space at the end away
                expected="an API key of printable ASCII characters, without a space at its ends",
                got="another",
                remedy="make a new key",
            )

    @property
    def default_model(self) -> str:
        """The one that is meant by requests without a name, and by paths that know no names."""
        return self.model_names[0]

    def connection(self, model_name: str) -> Connection:
        """To a model."""
        return Connection(self.triton_url, model_name, self.triton_tls, self.triton_headers)
