"""The usual way to serve a model: one padded forward pass for each request.

NV-Embed-v2's own format is computed by `transformers`' Mistral, any other folder by sentence-transformers' `encode`.

The folder of the checkpoint and the device come from NV_EMBED_MODEL_PATH and NV_EMBED_DEVICE, which serve.sh sets, the
precision from NV_EMBED_DTYPE. With "auto", or without it, NV-Embed-v2's format is computed in float32 on a CPU and in
the checkpoint's own precision on a GPU, and any other folder as the library does it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

QUERY_INSTRUCTION = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "
MAX_LENGTH = 32768
DTYPES = ("auto", "float32", "float16", "bfloat16")


class TritonPythonModel:
    """The entry points that Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load and warm up."""
        folder = Path(os.environ["NV_EMBED_MODEL_PATH"])
        kind = Library if (folder / "modules.json").is_file() else Embedder
        dtype = os.environ.get("NV_EMBED_DTYPE", "auto")
        if dtype not in DTYPES:
            raise pb_utils.TritonModelException(
                f"the baseline does not start: NV_EMBED_DTYPE: expected one of {', '.join(DTYPES)}, got {dtype!r}; "
                "correct it, or unset it"
            )
        try:
            embedder = kind(folder, os.environ.get("NV_EMBED_DEVICE", "cpu"), dtype)
        except ImportError as error:
            raise pb_utils.TritonModelException(
                f"the baseline does not start: {error}; pip install -r benchmarks/baseline/requirements.txt"
            ) from None
        embedder.embed(["warm-up"], is_query=True)
        self._embed = embedder.embed

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Embed the texts of one request after the other."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        query = pb_utils.get_input_tensor_by_name(request, "query")
        documents = pb_utils.get_input_tensor_by_name(request, "documents")
        tensor = query if documents is None else documents
        try:
            if (query is None) == (documents is None):
                raise ValueError("expected exactly one of the inputs 'query' and 'documents'")
            texts = [element.decode("utf-8") for element in tensor.as_numpy().reshape(-1)]
            if not texts:
                raise ValueError("expected at least 1 document")
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        embeddings = self._embed(texts, is_query=documents is None)
        return pb_utils.InferenceResponse([pb_utils.Tensor("embeddings", embeddings)])


class Embedder:
    """A checkpoint to a ready network, texts to vectors."""

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        import torch
        from padded import PaddedNetwork
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        target = torch.device(device.partition(",")[0])
        if dtype == "auto":
            dtype = "float32" if target.type == "cpu" else raw["torch_dtype"]
        weights: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= {name: tensor.to(target, getattr(torch, dtype)) for name, tensor in load_file(path).items()}
        self._network = PaddedNetwork(raw, weights)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_LENGTH)

    def embed(self, texts: Sequence[str], *, is_query: bool) -> npt.NDArray[np.float32]:
        """[texts, hidden_size], rows of length 1."""
        instruction = QUERY_INSTRUCTION if is_query else ""
        encodings = self._tokenizer.encode_batch_fast([instruction + text + "</s>" for text in texts])
        num_masked = len(self._tokenizer.encode(instruction, add_special_tokens=False).ids) if instruction else 0
        embeddings = self._network.embed([encoding.ids for encoding in encodings], num_masked)
        return embeddings.cpu().numpy()  # type: ignore[no-any-return]


class Library:
    """A folder of sentence-transformers, as its users call it."""

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        from sentence_transformers import SentenceTransformer

        kept = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
        self._model = SentenceTransformer(
            str(folder), device=device.partition(",")[0], local_files_only=True, model_kwargs=kept
        )
        # A network is loaded in this precision, except what it computes in float32, such as rotary frequencies. A
        # table of token vectors has no such part, and is loaded in its own precision.
        if kept and self._model.transformers_model is None:
            self._model.to(**kept)

    def embed(self, texts: Sequence[str], *, is_query: bool) -> npt.NDArray[np.float32]:
        """[texts, dimension], rows of length 1."""
        encode = self._model.encode_query if is_query else self._model.encode_document
        rows = encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return rows.astype(np.float32, copy=False)  # type: ignore[no-any-return]
