"""BERTopic's `BaseEmbedder`. Needs the extra `bertopic`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nv_embed_client.extras import needs_extra
from nv_embed_client.sentence_transformers import NVEmbedEncoder

with needs_extra("bertopic"):
    from bertopic.backend import BaseEmbedder


class NVEmbedBackend(BaseEmbedder):
    """NV-Embed-v2 for a topic model.

    topic_model = BERTopic(embedding_model=NVEmbedBackend("localhost:8001"))

    BERTopic refuses an `NVEmbedEncoder` itself.
    """

    def __init__(
        self,
        model: NVEmbedEncoder | str = "localhost:8001",
        *,
        instruction: str = "",
        query_instruction: str | None = None,
    ) -> None:
        """
        Args:
            model: an encoder, which stays its owner's to close, or the gRPC address for one of this backend's own.
            instruction: before each document; empty: none.
            query_instruction: replaces the standard one before each search term.
        """
        super().__init__()
        self.embedding_model = NVEmbedEncoder(model) if isinstance(model, str) else model
        self.instruction = instruction
        self.query_instruction = query_instruction

    def embed(self, documents: Sequence[str], verbose: bool = False) -> Any:
        """Documents, to [n, dim]; `verbose` shows a progress bar."""
        return self.embedding_model.encode(documents, prompt=self.instruction, show_progress_bar=verbose)

    def embed_words(self, words: Sequence[str], verbose: bool = False) -> Any:
        """Words as queries, to [n, dim]: a term to find topics with, or words of topics among each other."""
        return self.embedding_model.encode_query(words, prompt=self.query_instruction, show_progress_bar=verbose)
