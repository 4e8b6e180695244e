"""LlamaIndex's `BaseEmbedding`, sync and async. Needs the extra `llama-index`."""

from __future__ import annotations

from typing import Any

from nv_embed_client.async_client import AsyncNVEmbedClient
from nv_embed_client.client import NVEmbedClient
from nv_embed_client.extras import needs_extra
from nv_embed_client.instructions import checked_instruction

with needs_extra("llama-index"):
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import Field, PrivateAttr


class NVEmbedEmbedding(BaseEmbedding):
    """NV-Embed-v2 for LlamaIndex's indices and retrievers.

    index = VectorStoreIndex.from_documents(documents, embed_model=NVEmbedEmbedding(url="localhost:8001"))
    """

    url: str = Field(default="localhost:8001", description="The server's gRPC address.")
    query_instruction: str | None = Field(default=None, description="Replaces the standard one before each query.")
    # A field, because LlamaIndex loses everything else when it copies or pickles this; not in what it writes down.
    client_settings: dict[str, Any] = Field(
        default_factory=dict, exclude=True, repr=False, description="The other settings of `NVEmbedClient`."
    )

    _client: NVEmbedClient = PrivateAttr()
    _async_client: AsyncNVEmbedClient = PrivateAttr()

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        query_instruction: str | None = None,
        model_name: str = "nv-embed-v2",
        embed_batch_size: int = 256,
        client_settings: dict[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        """
        Args:
            url: the server's gRPC address.
            query_instruction: replaces the standard one before each query.
            model_name: as Triton knows it.
            embed_batch_size: texts that LlamaIndex hands over at once.
            client_settings: the other settings of `NVEmbedClient`.
            fields: the other fields of `BaseEmbedding`.
        """
        checked_instruction(query_instruction)
        fields.update(url=url, query_instruction=query_instruction, client_settings=client_settings or {})
        super().__init__(model_name=model_name, embed_batch_size=embed_batch_size, **fields)
        settings = {"model_name": model_name, **self.client_settings}
        self._client = NVEmbedClient(url, **settings)
        self._async_client = AsyncNVEmbedClient(url, **settings)

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name for this class."""
        return "NVEmbedEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return _floats(self._client.embed_query(query, instruction=self.query_instruction))[0]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return _floats(self._client.embed_documents(texts))

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return _floats(await self._async_client.embed_query(query, instruction=self.query_instruction))[0]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return _floats(await self._async_client.embed_documents(texts))


def _floats(embeddings: Any) -> list[list[float]]:
    rows: list[list[float]] = embeddings.tolist()
    return rows
