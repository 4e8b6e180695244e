"""The gateway as an ASGI application: OpenAI's embeddings API over an `AsyncNVEmbedClient`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from nv_embed_client.async_client import AsyncNVEmbedClient
from nv_embed_client.errors import NVEmbedError
from nv_embed_client.gateway import refusals
from nv_embed_client.gateway.metrics import GatewayMetrics
from nv_embed_client.gateway.middleware import LimitBody, Measure, RequireKey
from nv_embed_client.gateway.openapi import complete, responses
from nv_embed_client.gateway.schema import EmbeddingsRequest, EmbeddingsResponse, Health, Model, ModelList
from nv_embed_client.gateway.settings import GatewaySettings
from nv_embed_client.job import InputType
from nv_embed_client.retry import RetryPolicy
from nv_embed_client.wire import EmbedResult

T = TypeVar("T")

# A caller is told to come back rather than kept waiting; one more attempt covers a connection that just closed.
_RETRY = RetryPolicy(max_attempts=2)
_HUNG_UP = 499  # never seen by anybody but the metrics


def create_app(settings: GatewaySettings) -> FastAPI:
    """One gateway. It connects to Triton when the application starts and needs it for no answer but embeddings."""
    metrics = GatewayMetrics()
    models: dict[str, InputType | None] = {
        settings.model_name: None,
        f"{settings.model_name}-query": "query",
        f"{settings.model_name}-passage": "passage",
    }
    client: AsyncNVEmbedClient

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        nonlocal client
        async with AsyncNVEmbedClient(
            settings.triton_url,
            model_name=settings.model_name,
            tls=settings.triton_tls,
            headers=settings.triton_headers,
            request_timeout=settings.request_timeout_seconds,
            retry=_RETRY,
        ) as client:
            yield

    app = FastAPI(
        title="nv-embed-gateway",
        version="0.1.0",
        description="NV-Embed-v2 behind NVIDIA Triton, as the OpenAI API has it.",
        lifespan=lifespan,
    )
    app.add_middleware(LimitBody, max_body_bytes=settings.max_body_bytes)
    if settings.api_key is not None:
        app.add_middleware(RequireKey, api_key=settings.api_key)
    app.add_middleware(Measure, metrics=metrics)  # the last one added is the first to see a request
    app.add_exception_handler(RequestValidationError, refusals.of_validation_error)
    app.add_exception_handler(HTTPException, refusals.of_http_exception)
    app.add_exception_handler(Exception, refusals.of_defect)

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "nvidia"}

    def unknown_model(name: str) -> Response:
        return refusals.refusal(
            404,
            f"expected one of the models {', '.join(models)}; got {ascii(name)[:80]}; see /v1/models",
            param="model",
            code="model_not_found",
        )

    @app.post(
        "/v1/embeddings",
        summary="Embed texts",
        response_model=EmbeddingsResponse,
        responses=responses(400, 401, 404, 413, 502, 503, 504),
    )
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        """Embeds one text or many; vectors have length 1 and come in input order."""
        if body.model not in models:
            return unknown_model(body.model)
        of_suffix = models[body.model]
        if of_suffix is not None and body.input_type not in (None, of_suffix):
            return refusals.refusal(
                400,
                f"expected the input_type of {body.model!r}; got {body.input_type!r}; leave one of them out",
                param="input_type",
                code="contradiction",
            )
        texts = [body.input] if isinstance(body.input, str) else body.input
        if len(texts) > settings.max_inputs:
            return refusals.refusal(
                400,
                f"expected at most {settings.max_inputs} texts; got {len(texts)}; split them over several requests",
                param="input",
                code="too_many_inputs",
            )
        work = client.embed(
            texts,
            input_type=body.input_type or of_suffix or "passage",
            truncate=body.truncate,
            token_counts=True,
            timeout=settings.request_timeout_seconds,
        )
        try:
            result = await _unless_hung_up(request, work)
        except NVEmbedError as error:
            return refusals.of_client_error(error)
        if result is None:
            metrics.hung_up.inc()
            return Response(status_code=_HUNG_UP)
        assert result.token_counts is not None
        num_tokens = int(result.token_counts.sum())
        metrics.texts.inc(len(texts))
        metrics.tokens.inc(num_tokens)
        return Response(_encoded(result, body, num_tokens), media_type="application/json")

    @app.get("/v1/models", summary="List the models", response_model=ModelList, responses=responses(401))
    async def list_models() -> dict[str, Any]:
        """The names that `model` may have."""
        return {"object": "list", "data": [described(name) for name in models]}

    @app.get("/v1/models/{model:path}", summary="Look up a model", response_model=Model, responses=responses(401, 404))
    async def retrieve_model(model: str) -> Any:
        """One of the names that `model` may have."""
        return described(model) if model in models else unknown_model(model)

    @app.get("/health/live", summary="Is the gateway alive?", response_model=Health)
    async def live() -> dict[str, str]:
        """200 as long as the process answers."""
        return {"status": "live"}

    @app.get("/health/ready", summary="Can it embed?", response_model=Health, responses=responses(503))
    async def ready() -> Any:
        """200 when Triton answers and its model is loaded, else 503."""
        try:
            if await client.is_ready():
                return {"status": "ready"}
        except NVEmbedError:
            pass  # not ready is all that a probe asks
        return refusals.unavailable("expected a server with a loaded model; got none that answers; try again later")

    @app.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"description": "Prometheus' text format", "content": {"text/plain": {}}}},
    )
    async def prometheus() -> Response:
        """Requests, texts, tokens, durations and clients that hung up."""
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4")

    complete(app, settings, list(models))
    return app


async def _unless_hung_up(request: Request, work: Any) -> EmbedResult | None:
    """The outcome of `work`; None when the client hangs up first, and then `work` is cancelled."""
    working = asyncio.ensure_future(work)
    hanging_up = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({working, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, hanging_up):
            task.cancel()
        await asyncio.gather(working, hanging_up, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    # The body has been read, so all that can still come is that there is nobody to answer.
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _encoded(result: EmbedResult, body: EmbeddingsRequest, num_tokens: int) -> bytes:
    """The answer in JSON. Floats are written by orjson from the array, never one by one in Python."""
    rows: list[Any] = list(result.embeddings)
    if body.encoding_format == "base64":
        rows = [base64.b64encode(row.astype("<f4", copy=False)).decode("ascii") for row in rows]
    return orjson.dumps(
        {
            "object": "list",
            "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
            "model": body.model,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )
