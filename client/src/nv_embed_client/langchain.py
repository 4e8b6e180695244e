"""LangChain's `Embeddings`, sync and async. Needs the extra `langchain`."""

from __future__ import annotations

from typing import Any

from nv_embed_client.async_client import AsyncNVEmbedClient
from nv_embed_client.client import NVEmbedClient
from nv_embed_client.extras import needs_extra
from nv_embed_client.instructions import checked_instruction

with needs_extra("langchain"):
    from langchain_core.embeddings import Embeddings


class NVEmbedEmbeddings(Embeddings):
    """NV-Embed-v2 for LangChain's vector stores and retrievers.

    store = InMemoryVectorStore(NVEmbedEmbeddings("localhost:8001"))
    """

    def __init__(self, url: str = "localhost:8001", *, query_instruction: str | None = None, **settings: Any) -> None:
        """
        Args:
            url: the server's gRPC address.
            query_instruction: replaces the standard one before each query.
            settings: the other settings of `NVEmbedClient`.
        """
        self._query_instruction = checked_instruction(query_instruction)
        self._client = NVEmbedClient(url, **settings)
        self._async_client = AsyncNVEmbedClient(url, **settings)

    def embed_query(self, text: str) -> list[float]:
        """A query, with its instruction."""
        return _floats(self._client.embed_query(text, instruction=self._query_instruction))[0]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Documents, any number."""
        return _floats(self._client.embed_documents(texts))

    async def aembed_query(self, text: str) -> list[float]:
        """A query, with its instruction."""
        return _floats(await self._async_client.embed_query(text, instruction=self._query_instruction))[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Documents, any number."""
        return _floats(await self._async_client.embed_documents(texts))


def _floats(embeddings: Any) -> list[list[float]]:
    rows: list[list[float]] = embeddings.tolist()
    return rows
