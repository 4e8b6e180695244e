"""KeyBERT's `BaseEmbedder`. Needs the extra `keybert`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nv_embed_client.extras import needs_extra
from nv_embed_client.sentence_transformers import NVEmbedEncoder

with needs_extra("keybert"):
    from keybert.backend import BaseEmbedder


class NVEmbedBackend(BaseEmbedder):
    """NV-Embed-v2 for the keywords of documents.

    keywords = KeyBERT(NVEmbedBackend("localhost:8001")).extract_keywords(documents)

    KeyBERT refuses an `NVEmbedEncoder` itself.
    """

    def __init__(self, model: NVEmbedEncoder | str = "localhost:8001", *, instruction: str = "") -> None:
        """
        Args:
            model: an encoder, which stays its owner's to close, or the gRPC address for one of this backend's own.
            instruction: before each document and each word, because KeyBERT compares one with the other and does not
                say which is which; empty: none.
        """
        super().__init__()
        self.embedding_model = NVEmbedEncoder(model) if isinstance(model, str) else model
        self.instruction = instruction

    def embed(self, documents: Sequence[str], verbose: bool = False) -> Any:
        """Documents or words, to [n, dim]; `verbose` shows a progress bar."""
        return self.embedding_model.encode(documents, prompt=self.instruction, show_progress_bar=verbose)
