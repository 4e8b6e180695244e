"""The usual way to serve the model: one padded forward pass of `transformers`' Mistral for each request.

The folder of the checkpoint and the device come from NV_EMBED_MODEL_PATH and NV_EMBED_DEVICE, which serve.sh sets.
Shapes: B texts of a request, L tokens of the longest, C hidden_size, X num_cross_heads, D cross_dim_head.
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
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import MistralConfig, MistralModel
        from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text_config = raw["text_config"]
        latent_config = raw.get("latent_attention_config", {})
        self._device = torch.device(device.partition(",")[0])
        dtype = torch.float32 if self._device.type == "cpu" else getattr(torch, raw["torch_dtype"])

        weights: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= {name: tensor.to(self._device, dtype) for name, tensor in load_file(path).items()}
        prefix = "embedding_model."
        config = MistralConfig(
            **{name: text_config[name] for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "rms_norm_eps",
            )},
            rope_parameters={"rope_type": "default", "rope_theta": text_config["rope_theta"]},
            sliding_window=None,
            use_cache=False,
            attn_implementation="sdpa",
        )  # fmt: skip
        with torch.device("meta"):
            self._mistral = MistralModel(config)
        self._mistral.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)},
            assign=True,
        )
        self._mistral.rotary_emb = MistralRotaryEmbedding(config).to(self._device)  # holds no weights
        self._mistral.eval()
        with torch.inference_mode():
            self._head = LatentHead(weights, num_heads=latent_config.get("num_cross_heads", 8))

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_LENGTH)
        self._tokenizer.enable_padding()

    def embed(self, texts: Sequence[str], instruction: str) -> npt.NDArray[np.float32]:
        """[B, C], rows of length 1."""
        import torch
        from torch.nn import functional

        encodings = self._tokenizer.encode_batch_fast([instruction + text + "</s>" for text in texts])
        num_masked = len(self._tokenizer.encode(instruction, add_special_tokens=False).ids) if instruction else 0
        with torch.inference_mode():
            input_ids = torch.tensor([encoding.ids for encoding in encodings], device=self._device)  # [B, L]
            exists = torch.tensor([encoding.attention_mask for encoding in encodings], device=self._device).bool()
            length = input_ids.shape[1]
            # A mask of four dimensions is used as it is; any other would be made causal.
            mask = exists[:, None, None, :].expand(-1, 1, length, -1)
            hidden = self._mistral(input_ids=input_ids, attention_mask=mask).last_hidden_state  # [B, L, C]
            pooled = exists.clone()
            pooled[:, :num_masked] = False
            x = self._head(hidden).float() * pooled[..., None]
            mean = x.sum(dim=1) / pooled.sum(dim=1, keepdim=True)
            return functional.normalize(mean, dim=-1).cpu().numpy()


class LatentHead:
    """Cross-attention from tokens to the latents, then a GELU-gated MLP, each around a residual."""

    def __init__(self, weights: dict[str, Any], num_heads: int) -> None:
        from torch.nn import functional

        prefix = "latent_attention_model.cross_attend_blocks."
        self._weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        self._num_heads = num_heads
        latents = weights["latent_attention_model.latents"]
        context = functional.layer_norm(
            latents, latents.shape[-1:], self._weights["0.norm_context.weight"], self._weights["0.norm_context.bias"]
        )
        keys, values = functional.linear(context, self._weights["0.fn.to_kv.weight"]).chunk(2, dim=-1)
        self._keys, self._values = self._heads(keys[None]), self._heads(values[None])  # [1, X, latents, D]

    def _heads(self, x: Any) -> Any:
        return x.unflatten(-1, (self._num_heads, -1)).transpose(1, 2)

    def __call__(self, x: Any) -> Any:
        """[B, L, C] to [B, L, C]."""
        from torch.nn import functional

        w = self._weights
        h = functional.layer_norm(x, x.shape[-1:], w["0.norm.weight"], w["0.norm.bias"])
        q = self._heads(functional.linear(h, w["0.fn.to_q.weight"]))
        keys, values = (t.expand(len(x), -1, -1, -1) for t in (self._keys, self._values))
        attended = functional.scaled_dot_product_attention(q, keys, values)  # [B, X, L, D]
        x = x + functional.linear(attended.transpose(1, 2).flatten(2), w["0.fn.to_out.weight"])
        h = functional.layer_norm(x, x.shape[-1:], w["1.norm.weight"], w["1.norm.bias"])
        h = functional.linear(h, w["1.fn.net.0.weight"], w["1.fn.net.0.bias"])
        value, gate = h.chunk(2, dim=-1)
        return x + functional.linear(value * functional.gelu(gate), w["1.fn.net.2.weight"], w["1.fn.net.2.bias"])
