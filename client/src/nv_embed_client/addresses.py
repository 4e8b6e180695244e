"""Where servers are: what an address says, and which servers a name stands for now."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass

from nv_embed_client.errors import InvalidInput

# A host in brackets, or one without a colon; a port. gRPC would take a larger port modulo 65,536.
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Za-z:.%_-]+\]|[!-+\-.0-9;-Z^-~]+):([0-9]{1,5})")
_REMEDY = (
    "leave out the scheme and any space, use Triton's gRPC port, by default 8001, and put an IPv6 address in brackets"
)


@dataclass(frozen=True, slots=True)
class Address:
    """Of one server."""

    target: str
    """As gRPC reads it."""
    name: str | None = None
    """host:port that the server is known by, if the target is none: what a certificate is checked for."""


@dataclass(frozen=True, slots=True)
class Name:
    """A name that stands for any number of servers, each with an IP address of its own."""

    host: str
    port: int

    def servers(self) -> list[Address]:
        """Who it stands for now; asks the system's resolver and waits for it.

        Raises:
            OSError: nobody, or the resolver does not say.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except UnicodeError as error:  # a name that no DNS can have
            raise OSError(str(error)) from None
        name = f"{self.host}:{self.port}"
        targets = [
            f"ipv6:[{address[0]}]:{self.port}" if family == socket.AF_INET6 else f"ipv4:{address[0]}:{self.port}"
            for family, _, _, _, address in found
        ]
        return [Address(target, name) for target in dict.fromkeys(targets)]


def places_of(url: str) -> tuple[Address | Name, ...]:
    """What a client's `url` says.

    Args:
        url: one or more of `host:port`, `dns:///host:port` and `unix:path`, separated by commas.

    Raises:
        InvalidInput: it says nothing that makes sense.
    """
    places: dict[str, Address | Name] = {}
    for part in url.split(","):
        place = _place(part, url)
        if places.setdefault(part.lower(), place) is not place:
            raise InvalidInput.of(
                expected="different servers", got=f"{part!r} twice in {url!r}", remedy="leave one of them out"
            )
    return tuple(places.values())


def _place(part: str, url: str) -> Address | Name:
    if re.fullmatch(r"unix:[!-+\--~]+", part) and "//" not in part:
        return Address(part)
    is_name, rest = False, part
    for prefix in ("dns:///", "dns:", "ipv4:", "ipv6:"):
        if part.startswith(prefix):
            is_name, rest = prefix.startswith("dns"), part[len(prefix) :]
            break
    found = _HOST_AND_PORT.fullmatch(rest)
    if found is None or not 0 < int(found[2]) < 2**16 or not _is_host(found[1]):
        got = repr(url) if part == url else f"{part!r} in {url!r}"
        raise InvalidInput.of(expected="the gRPC address of a server as host:port", got=got, remedy=_REMEDY)
    return Name(found[1].strip("[]"), int(found[2])) if is_name else Address(part)


def _is_host(host: str) -> bool:
    if not host.startswith("["):
        return True
    try:
        return bool(ipaddress.IPv6Address(host[1:-1]))
    except ValueError:
        return False
