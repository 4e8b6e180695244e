"""The gateway as an ASGI application: OpenAI's embeddings API, and its neighbours', over an `AsyncNVEmbedClient`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from nv_embed_client.gateway import docs_page, health, openai_api, openapi, page, refusals, tei, trace
from nv_embed_client.gateway.embedder import Embedder
from nv_embed_client.gateway.metrics import GatewayMetrics
from nv_embed_client.gateway.middleware import AnswerDefects, GuardBody, Measure, Normalize, RequireKey
from nv_embed_client.gateway.names import names_of
from nv_embed_client.gateway.reply import TRUNCATED_TEXTS, Replies
from nv_embed_client.gateway.settings import GatewaySettings


def create_app(settings: GatewaySettings, url: str | None = None) -> FastAPI:
    """One gateway. It connects to Triton when the application starts, and needs it for no answer but embeddings.

    Args:
        url: where people will find it, as the log says it.
    """
    metrics = GatewayMetrics()
    names = names_of(settings.model_names, settings.aliases)
    embedder = Embedder(settings, metrics)
    replies = Replies()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with embedder.connected(url):
            yield

    app = FastAPI(
        title="nv-embed-gateway",
        version=openapi.VERSION,
        description="Embedding models behind NVIDIA Triton, as the OpenAI API has them.",
        lifespan=lifespan,
        redirect_slashes=False,
        # FastAPI's own pages load scripts from the internet, and its OpenAPI page cannot ask the server.
        openapi_url=None,
    )
    # The last one added is the first to see a request.
    app.add_middleware(GuardBody, max_body_bytes=settings.max_body_bytes)
    if settings.api_key is not None:
        app.add_middleware(RequireKey, api_key=settings.api_key)
    app.add_middleware(trace.PassOn)
    app.add_middleware(AnswerDefects)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Should-Retry", TRUNCATED_TEXTS],
        )
    app.add_middleware(Measure, metrics=metrics)
    app.add_middleware(Normalize)
    for kind in (RequestValidationError, HTTPException):
        app.add_exception_handler(kind, refusals.handle)

    app.include_router(openai_api.operations(settings, names, embedder, replies))
    app.include_router(tei.operations(settings, embedder, replies))
    app.include_router(health.operations(settings, embedder, metrics))

    page.add_to(app, settings)

    async def description() -> dict[str, Any]:
        return openapi.page(app, settings, names, await embedder.known_infos())

    @app.get("/openapi.json", include_in_schema=False)
    async def page_for_programs() -> JSONResponse:
        return JSONResponse(await description())

    @app.get("/docs", include_in_schema=False)
    async def page_for_people() -> HTMLResponse:
        return HTMLResponse(docs_page.html(await description()), headers=docs_page.HEADERS)

    return app
