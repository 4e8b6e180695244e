"""The trace that a request belongs to: its headers go on to Triton, as W3C's Trace Context has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextvars import ContextVar

from starlette.types import ASGIApp, Receive, Scope, Send

_HEADERS = {
    "traceparent": re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"),
    "tracestate": re.compile(r"[ -~]{1,512}"),
}
_NONE: Mapping[str, str] = {}
_current: ContextVar[Mapping[str, str]] = ContextVar("trace headers of the request that this task answers")


class PassOn:
    """Keeps the trace headers of a request for what its task sends to Triton. Malformed ones are left out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            well_formed = {name: given[name] for name, form in _HEADERS.items() if form.fullmatch(given.get(name, ""))}
            _current.set(well_formed if "traceparent" in well_formed else _NONE)
        await self._app(scope, receive, send)


def headers_beside(own: Mapping[str, str]) -> dict[str, str]:
    """The gateway's own headers, and those of the trace of the request that this task answers."""
    return {**_current.get(_NONE), **own}
