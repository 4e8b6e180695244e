"""What happens before a request is understood: the key, the size of the body, the count.

Plain ASGI, so that a body that is refused is never read and an answer passes without being copied.
"""

from __future__ import annotations

import hmac
import time

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nv_embed_client.gateway.metrics import GatewayMetrics
from nv_embed_client.gateway.refusals import refusal


class RequireKey:
    """Refuses what begins with /v1/ without the right key in `Authorization: Bearer ...`."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            scheme, _, key = given.partition(b" ")
            # Compared in a time that says nothing about the key.
            if not (hmac.compare_digest(key, self._expected) and scheme.lower() == b"bearer"):
                response = refusal(
                    401,
                    "expected the API key of this gateway as 'Authorization: Bearer ...'; "
                    f"got {'another' if given else 'none'}; ask its operator for the key",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class LimitBody:
    """Refuses a body of more than so many bytes, before reading it where its length is given."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._max:
                response = refusal(413, self._message(f"{int(value)}"), code="body_too_large")
                await response(scope, receive, send)
                return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max:
                raise HTTPException(413, self._message(f"more than {self._max}"))
            return message

        await self._app(scope, counted, send)

    def _message(self, got: str) -> str:
        return f"expected a body of at most {self._max} bytes; got {got}; split the input over several requests"


class Measure:
    """Counts requests by path and status, and how long they take."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        start = time.perf_counter()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with self._metrics.in_flight.track_inprogress():
                await self._app(scope, receive, noted)
        finally:
            self._metrics.observe(scope["path"], status, time.perf_counter() - start)
