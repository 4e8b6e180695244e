"""What happens before a request is understood: its path, the count, the key, the size of the body.

Plain ASGI, so that a body that is refused is never read and an answer passes without being copied.
"""

from __future__ import annotations

import hmac
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nv_embed_client.gateway import paths
from nv_embed_client.gateway.metrics import GatewayMetrics
from nv_embed_client.gateway.refusals import Refusal


class Normalize:
    """Answers a path with too many slashes instead of redirecting it, and HEAD as GET.

    The HTTP server leaves the body out of an answer to HEAD.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            scope = {**scope, "path": paths.normal(scope["path"]), "method": method}
        await self._app(scope, receive, send)


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


class AnswerDefects:
    """Answers 500 where the gateway itself fails, and lets the error go on to uvicorn's log.

    Starlette would answer outside all middleware, and the answer would lack the headers that browsers want.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            if scope["type"] == "http" and not started:
                message = "expected an answer; the gateway failed; its operator's log says why"
                await Refusal(500, message, code="internal").answer(scope["path"])(scope, receive, send)
            raise


class RequireKey:
    """Refuses all but the open paths without the right key in `Authorization: Bearer ...`."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not paths.is_open(scope["method"], scope["path"]):
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            scheme, _, key = given.partition(b" ")
            # Compared in a time that says nothing about the key.
            if not (hmac.compare_digest(key, self._expected) and scheme.lower() == b"bearer"):
                refusal = Refusal(
                    401,
                    "expected the API key of this gateway as 'Authorization: Bearer ...'; "
                    f"got {'another' if given else 'none'}; ask its operator for the key",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await refusal.answer(scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


class GuardBody:
    """Refuses a compressed body and one that is too large, before reading it if its length is given."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if (refusal := self._refusal(scope)) is not None:
            await refusal.answer(scope["path"])(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max:
                raise self._too_large(f"more than {self._max}")
            return message

        await self._app(scope, counted, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        for name, value in scope["headers"]:
            if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
                encoding = ascii(value.decode("latin-1"))[:80]
                return Refusal(
                    415,
                    f"expected a body without compression; got Content-Encoding {encoding}; send it as it is",
                    code="content_encoding",
                    headers={"Accept-Encoding": "identity"},
                )
            if name == b"content-length" and value.isdigit() and int(value) > self._max:
                return self._too_large(f"{int(value)}")
        return None

    def _too_large(self, got: str) -> Refusal:
        return Refusal(
            413,
            f"expected a body of at most {self._max} bytes; got {got}; split the input over several requests",
            code="body_too_large",
        )
