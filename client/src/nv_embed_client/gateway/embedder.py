"""Texts to vectors: what all operations of a gateway do with its clients of Triton, one for each model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request

from nv_embed_client.async_client import AsyncNVEmbedClient
from nv_embed_client.embedding_type import EmbeddingType
from nv_embed_client.errors import NVEmbedError, ServerTooOld
from nv_embed_client.gateway import refusals, trace
from nv_embed_client.gateway.metrics import GatewayMetrics
from nv_embed_client.gateway.names import Named
from nv_embed_client.gateway.refusals import Refusal
from nv_embed_client.gateway.settings import GatewaySettings
from nv_embed_client.grpc_transport import GrpcTransport
from nv_embed_client.model_info import ModelInfo
from nv_embed_client.retry import RetryPolicy
from nv_embed_client.transport import Transport
from nv_embed_client.wire import EmbedResult, Truncate

# A caller is told to come back rather than kept waiting; one more attempt covers a connection that just closed.
_RETRY = RetryPolicy(max_attempts=2)
# What the log says at the start has time: the server may load its weights for long.
_PATIENCE = RetryPolicy(max_attempts=2**31)
_PATIENCE_SECONDS = 24 * 3600.0
_PAGE_SECONDS = 5.0  # what describes the gateway does not wait longer for a server that is busy
_HUNG_UP = 499  # never seen by anybody but the metrics

logger = logging.getLogger("uvicorn.error")  # where the gateway's other lines go


class Embedder:
    """One gateway's way to the models. Raises a `Refusal` for whatever goes wrong."""

    def __init__(self, settings: GatewaySettings, metrics: GatewayMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._clients: dict[str, AsyncNVEmbedClient] = {}  # by the names of their models

    @contextlib.asynccontextmanager
    async def connected(self, url: str | None = None) -> AsyncIterator[None]:
        """As long as this lasts it can embed; a server that is absent is asked again at each request.

        Args:
            url: of the gateway's page, as the log says it.
        """
        settings = self._settings
        connection = settings.connection(settings.default_model)
        headers = partial(trace.headers_beside, settings.triton_headers)
        transport = GrpcTransport(replace(connection, headers=headers))
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(transport.close)
            for name in settings.model_names:
                client = AsyncNVEmbedClient(
                    settings.triton_url,
                    name,
                    request_timeout=settings.request_timeout_seconds,
                    retry=_RETRY,
                    transport=transport.for_model(name),
                )
                self._clients[name] = await stack.enter_async_context(client)
            saying = asyncio.gather(*(self._say(name, transport.for_model(name), url) for name in settings.model_names))
            try:
                yield
            finally:
                saying.cancel()
                await asyncio.gather(saying, return_exceptions=True)

    async def _say(self, name: str, transport: Transport, url: str | None) -> None:
        """Log once what the server says about a model, as soon as there is a server."""
        async with AsyncNVEmbedClient(transport=transport, retry=_PATIENCE) as client:
            try:
                info = await client.model_info(_PATIENCE_SECONDS)
            except NVEmbedError as error:
                refusals.of_client_error(error, name, (), _PATIENCE_SECONDS)  # logs it
            else:
                hint = "" if url is None else f"; try it at {url}"
                logger.info(
                    "model %s: dimension %d, texts of up to %d tokens, fingerprint %s%s",
                    name, info.dimension, info.max_sequence_tokens, info.fingerprint, hint,
                )  # fmt: skip

    async def embed(
        self,
        request: Request,
        texts: Sequence[str],
        named: Named,
        truncate: Truncate,
        dimensions: int | None,
        *,
        embedding_type: EmbeddingType = "float",
        is_truncated: bool = False,
    ) -> tuple[EmbedResult, int]:
        """The vectors, and how many tokens all texts had.

        Args:
            request: if its client hangs up, the work is cancelled.
            named: the model, and how texts are to be embedded.
            dimensions: what the request wants of each vector.
            is_truncated: whether it wants to know which texts were cut. If not, an older server need not say.
        """
        if len(texts) > self._settings.max_inputs:
            raise Refusal(
                400,
                f"expected at most {self._settings.max_inputs} texts; got {len(texts)}; split them over several "
                "requests",
                param="input",
                code=refusals.TOO_MANY,
            )
        seconds = self._settings.request_timeout_seconds
        work = self._embedded(texts, named, truncate, dimensions, embedding_type, is_truncated)
        try:
            result = await _unless_hung_up(request, work)
        except NVEmbedError as error:
            raise refusals.of_client_error(error, named.model, texts, seconds) from error
        if result is None:
            self._metrics.hung_up.inc()
            raise Refusal(_HUNG_UP, "expected a client that waits for its answer; got one that hung up; wait longer")
        assert result.token_counts is not None
        num_tokens = int(result.token_counts.sum())
        self._metrics.texts.inc(len(texts))
        self._metrics.tokens.inc(num_tokens)
        if result.is_truncated is not None:
            self._metrics.truncated_texts.inc(int(result.is_truncated.sum()))
        return result, num_tokens

    async def _embedded(
        self,
        texts: Sequence[str],
        named: Named,
        truncate: Truncate,
        dimensions: int | None,
        embedding_type: EmbeddingType,
        is_truncated: bool,
    ) -> EmbedResult:
        client, seconds = self._clients[named.model], self._settings.request_timeout_seconds
        if dimensions is not None and dimensions != (own := await client.dimension(seconds)):
            raise Refusal(
                400,
                f"expected dimensions of {own}, because {named.model} does not support matryoshka "
                f"representation; got {dimensions}; leave it out, or send {own}",
                param="dimensions",
                code="dimensions",
            )
        embed = partial(
            client.embed,
            texts,
            input_type=named.meaning.input_type or "passage",
            instruction=named.meaning.instruction,
            truncate=truncate,
            token_counts=True,
            timeout=seconds,
            embedding_type=embedding_type,
        )
        try:
            return await embed(is_truncated=True)
        except ServerTooOld:
            if is_truncated:
                raise
        return await embed()

    async def is_ready(self) -> bool:
        """Whether Triton answers and all models are loaded."""
        try:
            return all(await asyncio.gather(*(client.is_ready() for client in self._clients.values())))
        except NVEmbedError:
            return False  # not ready is all that a probe asks

    async def model_info(self, model: str) -> ModelInfo:
        """What the server says about a model."""
        try:
            return await self._clients[model].model_info(_PAGE_SECONDS)
        except NVEmbedError as error:
            raise refusals.of_client_error(error, model, (), _PAGE_SECONDS) from error

    async def known_info(self, model: str) -> ModelInfo | None:
        """The same; None while the server does not say."""
        try:
            return await self._clients[model].model_info(_PAGE_SECONDS)
        except NVEmbedError:
            return None

    async def known_infos(self) -> dict[str, ModelInfo | None]:
        """The same of all models."""
        return dict(zip(self._clients, await asyncio.gather(*map(self.known_info, self._clients)), strict=True))


async def _unless_hung_up(request: Request, work: Coroutine[Any, Any, EmbedResult]) -> EmbedResult | None:
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
