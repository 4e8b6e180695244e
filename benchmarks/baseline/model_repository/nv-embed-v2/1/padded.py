"""The network as one would write it in an afternoon: `transformers`' Mistral on padded rows, the latent head unfolded.

Shapes: B texts, L tokens of the longest, C hidden_size, X num_cross_heads, D cross_dim_head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import MistralConfig, MistralModel
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding


class PaddedNetwork:
    """Token rows to one unit vector each."""

    def __init__(self, raw: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """
        Args:
            raw: the parsed config.json.
            weights: every published tensor by its name, all on one device and in one precision; kept, not copied.
        """
        text_config = raw["text_config"]
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
        prefix = "embedding_model."
        with torch.device("meta"):
            self._mistral = MistralModel(config)
        self._mistral.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)},
            assign=True,
        )
        self._device = weights[prefix + "norm.weight"].device
        self._mistral.rotary_emb = MistralRotaryEmbedding(config).to(self._device)  # holds no weights
        self._mistral.eval()
        with torch.inference_mode():
            self._head = LatentHead(weights, (raw.get("latent_attention_config") or {}).get("num_cross_heads", 8))

    @torch.inference_mode()
    def embed(self, rows: Sequence[Sequence[int]], num_masked: int | Sequence[int]) -> Tensor:
        """Rows of token ids, of which the first `num_masked` (of all, or of each) are not pooled, to [B, C] float32."""
        width = max(map(len, rows))
        padded = [[*row, *[2] * (width - len(row))] for row in rows]
        input_ids = torch.tensor(padded, device=self._device)  # [B, L]
        lengths = torch.tensor([len(row) for row in rows], device=self._device)[:, None]
        positions = torch.arange(width, device=self._device)
        exists = positions < lengths
        # A mask of four dimensions is used as it is; any other would be made causal. Without padding there is none, as
        # in the published code, and SDPA may take its fastest kernel.
        is_padded = min(map(len, rows)) < width
        mask = exists[:, None, None, :].expand(-1, 1, width, -1) if is_padded else None
        for layer in self._mistral.layers:
            layer.self_attn.is_causal = False
        hidden = self._mistral(input_ids=input_ids, attention_mask=mask).last_hidden_state  # [B, L, C]
        pooled = exists & (positions >= torch.tensor(num_masked, device=self._device).reshape(-1, 1))
        x = self._head(hidden).float() * pooled[..., None]
        return functional.normalize(x.sum(dim=1) / pooled.sum(dim=1, keepdim=True), dim=-1)


class LatentHead:
    """Cross-attention from tokens to the latents, then a GELU-gated MLP, each around a residual."""

    def __init__(self, weights: Mapping[str, Tensor], num_heads: int) -> None:
        prefix = "latent_attention_model.cross_attend_blocks."
        self._weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        self._num_heads = num_heads
        latents = weights["latent_attention_model.latents"]
        context = functional.layer_norm(
            latents, latents.shape[-1:], self._weights["0.norm_context.weight"], self._weights["0.norm_context.bias"]
        )
        keys, values = functional.linear(context, self._weights["0.fn.to_kv.weight"]).chunk(2, dim=-1)
        self._keys, self._values = self._heads(keys[None]), self._heads(values[None])  # [1, X, latents, D]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self._num_heads, -1)).transpose(1, 2)

    def __call__(self, x: Tensor) -> Tensor:
        """[B, L, C] to [B, L, C]."""
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
