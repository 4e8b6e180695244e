"""Texts to vectors: what all operations of a gateway do with its one client of Triton."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from fastapi import Request

from nv_embed_client.async_client import AsyncNVEmbedClient
from nv_embed_client.errors import InvalidInput, NVEmbedError
from nv_embed_client.gateway import refusals
from nv_embed_client.gateway.metrics import GatewayMetrics
from nv_embed_client.gateway.names import Meaning
from nv_embed_client.gateway.refusals import Refusal
from nv_embed_client.gateway.settings import GatewaySettings
from nv_embed_client.retry import RetryPolicy
from nv_embed_client.wire import EmbedResult, Truncate

# A caller is told to come back rather than kept waiting; one more attempt covers a connection that just closed.
_RETRY = RetryPolicy(max_attempts=2)
_PAGE_SECONDS = 5.0  # what describes the gateway does not wait longer for a server that is busy
_HUNG_UP = 499  # never seen by anybody but the metrics
_TOO_MANY_WORDS = 2**17  # more tokens than any model here takes


class Embedder:
    """One gateway's way to the model. Raises a `Refusal` for whatever goes wrong."""

    def __init__(self, settings: GatewaySettings, metrics: GatewayMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._client: AsyncNVEmbedClient
        self._max_text_tokens: int | None = None

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """As long as this lasts it can embed; a server that is absent is asked again at each request."""
        async with AsyncNVEmbedClient(
            self._settings.triton_url,
            model_name=self._settings.model_name,
            tls=self._settings.triton_tls,
            headers=self._settings.triton_headers,
            request_timeout=self._settings.request_timeout_seconds,
            retry=_RETRY,
        ) as self._client:
            yield

    async def embed(
        self, request: Request, texts: Sequence[str], meaning: Meaning, truncate: Truncate, dimensions: int | None
    ) -> tuple[EmbedResult, int]:
        """The vectors, and how many tokens all texts had.

        Args:
            request: if its client hangs up, the work is cancelled.
            dimensions: what the request wants of each vector.
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
        work = self._embedded(texts, meaning, truncate, dimensions)
        try:
            result = await _unless_hung_up(request, work)
        except NVEmbedError as error:
            raise refusals.of_client_error(error, texts, seconds) from error
        if result is None:
            self._metrics.hung_up.inc()
            raise Refusal(_HUNG_UP, "expected a client that waits for its answer; got one that hung up; wait longer")
        assert result.token_counts is not None
        num_tokens = int(result.token_counts.sum())
        self._metrics.texts.inc(len(texts))
        self._metrics.tokens.inc(num_tokens)
        return result, num_tokens

    async def _embedded(
        self, texts: Sequence[str], meaning: Meaning, truncate: Truncate, dimensions: int | None
    ) -> EmbedResult:
        seconds = self._settings.request_timeout_seconds
        if dimensions is not None and dimensions != (own := await self._client.dimension(seconds)):
            raise Refusal(
                400,
                f"expected dimensions of {own}, because {self._settings.model_name} does not support matryoshka "
                f"representation; got {dimensions}; leave it out, or send {own}",
                param="dimensions",
                code="dimensions",
            )
        return await self._client.embed(
            texts,
            input_type=meaning.input_type or "passage",
            instruction=meaning.instruction,
            truncate=truncate,
            token_counts=True,
            timeout=seconds,
        )

    async def is_ready(self) -> bool:
        """Whether Triton answers and its model is loaded."""
        try:
            return await self._client.is_ready()
        except NVEmbedError:
            return False  # not ready is all that a probe asks

    async def dimension(self) -> int | None:
        """Of the vectors; None while the server cannot say."""
        try:
            return await self._client.dimension(_PAGE_SECONDS)
        except NVEmbedError:
            return None

    async def max_text_tokens(self) -> int:
        """The longest text that the server takes without cutting it, learnt from how it refuses one too long."""
        if self._max_text_tokens is None:
            too_long = ["word " * _TOO_MANY_WORDS]  # refused before anything is computed
            try:
                result = await self._client.embed(too_long, truncate="NONE", token_counts=True, timeout=_PAGE_SECONDS)
                assert result.token_counts is not None
                self._max_text_tokens = int(result.token_counts[0])
            except NVEmbedError as error:
                found = re.search(r"at most (\d+) tokens", str(error)) if isinstance(error, InvalidInput) else None
                if found is None:
                    raise refusals.of_client_error(error, too_long, _PAGE_SECONDS) from error
                self._max_text_tokens = int(found[1])
        return self._max_text_tokens


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
