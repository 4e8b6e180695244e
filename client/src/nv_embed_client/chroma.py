"""Chroma's `EmbeddingFunction`. Needs the extra `chroma`."""

from __future__ import annotations

from typing import Any

from nv_embed_client.client import NVEmbedClient
from nv_embed_client.connection import DEFAULT_MODEL_NAME, DEFAULT_URL
from nv_embed_client.extras import needs_extra

with needs_extra("chroma"):
    from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
    from chromadb.utils.embedding_functions import register_embedding_function


@register_embedding_function
class NVEmbedEmbeddingFunction(EmbeddingFunction[Documents]):
    """NV-Embed-v2 for Chroma's collections: documents as documents, `query_texts` as queries.

    collection = chroma.create_collection("texts", embedding_function=NVEmbedEmbeddingFunction("localhost:8001"))

    Chroma stores the function's name and its first three arguments with a collection, and nothing else. Any process
    that has imported this module then finds the function again.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model_name: str = DEFAULT_MODEL_NAME,
        query_instruction: str | None = None,
        **settings: Any,
    ) -> None:
        """
        Args:
            url: the server's gRPC address.
            model_name: as Triton knows it.
            query_instruction: replaces the standard one before each query.
            settings: the other settings of `NVEmbedClient`, such as `headers`, which may be secret. Where they are
                needed, pass the function to `get_collection`, too.
        """
        self.query_instruction = query_instruction
        self._client = NVEmbedClient(url, model_name=model_name, **settings)

    def __call__(self, input: Documents) -> Embeddings:
        """Documents, to one vector each."""
        return list(self._client.embed_documents(input))

    def embed_query(self, input: Documents) -> Embeddings:
        """Queries, each with its instruction, to one vector each."""
        return list(self._client.embed_queries(input, instruction=self.query_instruction))

    def close(self) -> None:
        """Give up the connection."""
        self._client.close()

    @staticmethod
    def name() -> str:
        """By which Chroma finds it again."""
        return "nv-embed"

    def default_space(self) -> Space:
        """Cosine, because all vectors have length 1."""
        return "cosine"

    def get_config(self) -> dict[str, Any]:
        """What Chroma stores with a collection."""
        client = self._client
        return {"url": client.url, "model_name": client.model_name, "query_instruction": self.query_instruction}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> NVEmbedEmbeddingFunction:
        """The function of a stored collection."""
        return NVEmbedEmbeddingFunction(**config)
