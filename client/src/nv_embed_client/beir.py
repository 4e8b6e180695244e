"""What BEIR asks of a dense model. Needs the extra `sentence-transformers`, because BEIR wants tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nv_embed_client.sentence_transformers import NVEmbedEncoder


class NVEmbedRetriever:
    """NV-Embed-v2 for BEIR's exact search.

    search = DenseRetrievalExactSearch(NVEmbedRetriever("localhost:8001", prompt_name="SciFact"))
    """

    def __init__(
        self,
        model: NVEmbedEncoder | str = "localhost:8001",
        *,
        prompt_name: str = "query",
        document_prompt_name: str | None = None,
        sep: str = " ",
    ) -> None:
        """
        Args:
            model: an encoder, which stays its owner's to close, or the gRPC address for one of this object's own.
            prompt_name: of the queries: a key of the encoder's `prompts`, such as the task's name.
            document_prompt_name: of the documents; None is "document", which is no instruction.
            sep: stands between a document's title and its text.
        """
        self.model = NVEmbedEncoder(model) if isinstance(model, str) else model
        self.prompt_name = prompt_name
        self.document_prompt_name = document_prompt_name
        self.sep = sep

    def encode_queries(self, queries: Sequence[str], batch_size: int = 32, **arguments: Any) -> Any:
        """Queries, to [n, dim]; `arguments` are those of `NVEmbedEncoder.encode`."""
        return self.model.encode_query(queries, self.prompt_name, batch_size=batch_size, **arguments)

    def encode_corpus(
        self,
        corpus: Sequence[Mapping[str, str] | str] | Mapping[str, Sequence[str]],
        batch_size: int = 32,
        **arguments: Any,
    ) -> Any:
        """Documents, to [n, dim].

        Args:
            corpus: texts, or mappings with "text" and perhaps "title", or one mapping with a column of each.
            batch_size: texts in one request.
            arguments: those of `NVEmbedEncoder.encode`.
        """
        if isinstance(corpus, Mapping):
            rows: Any = (dict(zip(corpus, row, strict=True)) for row in zip(*corpus.values(), strict=True))
        else:
            rows = corpus
        texts = [row if isinstance(row, str) else self._joined(row) for row in rows]
        return self.model.encode_document(texts, self.document_prompt_name, batch_size=batch_size, **arguments)

    def _joined(self, document: Mapping[str, str]) -> str:
        return f"{document.get('title', '')}{self.sep}{document['text']}".strip()
