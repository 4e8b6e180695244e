"""Which HTTP proxy the environment has gRPC use, because gRPC's own errors do not say."""

from __future__ import annotations

import ipaddress
import os


def proxy_hint(url: str) -> str | None:
    """What to say when a server does not answer and gRPC asked a proxy for it; None when it asks none.

    Args:
        url: the server's address, host:port.
    """
    # gRPC looks at these names in this order, in lower case only.
    variable = next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if name in os.environ), None)
    # It understands no other scheme, and asks the server itself when there is another or none.
    scheme, _, address = os.environ.get(variable or "", "").partition("://")
    if variable is None or scheme.lower() != "http" or url.startswith("unix:"):
        return None
    host = url.rpartition(":")[0].strip("[]")
    exempt = next((os.environ[name] for name in ("no_grpc_proxy", "no_proxy") if name in os.environ), "")
    if any(_is_exempt(host, entry.strip()) for entry in exempt.split(",") if entry.strip()):
        return None
    proxy = address.rpartition("@")[2].partition("/")[0]  # without a password
    return (
        f"the variable {variable} in the environment sends this connection through the proxy {proxy}; if the server is "
        f"to be reached without it, add {host} to no_proxy (NO_PROXY in lower case, because gRPC reads no other)"
    )


def _is_exempt(host: str, entry: str) -> bool:
    if host.lower().endswith(entry.removeprefix(".").lower()):
        return True
    try:
        return "/" in entry and ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False
