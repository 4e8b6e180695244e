"""The usual way to serve the model: one padded forward pass of `transformers`' Mistral for each request.

The folder of the checkpoint and the device come from NV_EMBED_MODEL_PATH and NV_EMBED_DEVICE, which serve.sh sets.
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


class TritonPythonModel:
    """The entry points that Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load and warm up."""
        try:
            embedder = Embedder(Path(os.environ["NV_EMBED_MODEL_PATH"]), os.environ.get("NV_EMBED_DEVICE", "cpu"))
        except ImportError as error:
            raise pb_utils.TritonModelException(
                f"the baseline does not start: {error}; pip install -r benchmarks/baseline/requirements.txt"
            ) from None
        embedder.embed(["warm-up"], QUERY_INSTRUCTION)
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
        embeddings = self._embed(texts, QUERY_INSTRUCTION if documents is None else "")
        return pb_utils.InferenceResponse([pb_utils.Tensor("embeddings", embeddings)])


class Embedder:
    """A checkpoint to a ready network, texts to vectors."""

    def __init__(self, folder: Path, device: str) -> None:
        import torch
        from padded import PaddedNetwork
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        target = torch.device(device.partition(",")[0])
        dtype = torch.float32 if target.type == "cpu" else getattr(torch, raw["torch_dtype"])
        weights: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= {name: tensor.to(target, dtype) for name, tensor in load_file(path).items()}
        self._network = PaddedNetwork(raw, weights)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_LENGTH)

    def embed(self, texts: Sequence[str], instruction: str) -> npt.NDArray[np.float32]:
        """[texts, hidden_size], rows of length 1."""
        encodings = self._tokenizer.encode_batch_fast([instruction + text + "</s>" for text in texts])
        num_masked = len(self._tokenizer.encode(instruction, add_special_tokens=False).ids) if instruction else 0
        embeddings = self._network.embed([encoding.ids for encoding in encodings], num_masked)
        return embeddings.cpu().numpy()  # type: ignore[no-any-return]
