"""A naive reference of the model on `transformers`' own Mistral layers: padded, masked, unfolded, float32.

It shares no code with the product. It also draws random checkpoints, written in the published format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import MistralConfig, MistralModel


class GatedMLP(nn.Module):
    """Half of the first linear's output is the value, the other half the gate."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(size, 8 * size), nn.Identity(), nn.Linear(4 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.net[0](x).chunk(2, dim=-1)
        return self.net[2](value * functional.gelu(gate))


class CrossAttention(nn.Module):
    """Queries from tokens, keys and values from latents."""

    def __init__(self, size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.to_q = nn.Linear(size, num_heads * head_dim, bias=False)
        self.to_kv = nn.Linear(size, 2 * num_heads * head_dim, bias=False)
        self.to_out = nn.Linear(num_heads * head_dim, size, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-2, -3)

        k, v = self.to_kv(context).chunk(2, dim=-1)
        weights = (heads(self.to_q(x)) @ heads(k).transpose(-1, -2) / self.head_dim**0.5).softmax(dim=-1)
        return self.to_out((weights @ heads(v)).transpose(-2, -3).flatten(-2))


class Block(nn.Module):
    """Norms around what computes; named so that the parameters get their published names."""

    def __init__(self, fn: nn.Module, size: int, has_context: bool) -> None:
        super().__init__()
        self.fn, self.norm = fn, nn.LayerNorm(size)
        self.norm_context = nn.LayerNorm(size) if has_context else None


class LatentAttention(nn.Module):
    def __init__(self, size: int, num_latents: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, size))
        self.cross_attend_blocks = nn.ModuleList(
            [Block(CrossAttention(size, num_heads, head_dim), size, True), Block(GatedMLP(size), size, False)]
        )

    def forward(self, x: Tensor) -> Tensor:
        attention, mlp = self.cross_attend_blocks
        x = x + attention.fn(attention.norm(x), attention.norm_context(self.latents))
        return x + mlp.fn(mlp.norm(x))


@dataclass
class Sizes:
    """Of a random checkpoint; names as in config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    num_latents_value: int
    num_cross_heads: int
    cross_dim_head: int
    rope_theta: float

    @classmethod
    def draw(cls, random: Random) -> Sizes:
        num_kv_heads, head_dim = random.choice([1, 2, 3]), random.choice([8, 16, 24])
        num_heads = num_kv_heads * random.choice([1, 2, 4])
        return cls(
            vocab_size=random.randint(50, 400),
            hidden_size=num_heads * head_dim,
            num_hidden_layers=random.randint(1, 4),
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            intermediate_size=random.randint(16, 200),
            num_latents_value=random.randint(1, 20),
            num_cross_heads=random.randint(1, 4),
            cross_dim_head=random.choice([8, 16, 40]),
            rope_theta=random.choice([100.0, 10000.0]),
        )


class Reference(nn.Module):
    """The whole model. Its state dict has the published names and is the checkpoint."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.sizes = sizes
        config = MistralConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
            num_hidden_layers=sizes.num_hidden_layers,
            num_attention_heads=sizes.num_attention_heads,
            num_key_value_heads=sizes.num_key_value_heads,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
            sliding_window=None,
            use_cache=False,
            attn_implementation="eager",
        )
        self.embedding_model = MistralModel(config)
        self.latent_attention_model = LatentAttention(
            sizes.hidden_size, sizes.num_latents_value, sizes.num_cross_heads, sizes.cross_dim_head
        )
        for name, parameter in self.named_parameters():  # larger than at birth, so that every weight matters
            nn.init.normal_(parameter, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.15)
        self.eval()

    @torch.no_grad()
    def embed(self, sequences: list[list[int]], num_masked: list[int]) -> np.ndarray:
        """[S, C]: all sequences padded on the right to the longest, in one forward pass."""
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        positions = torch.arange(int(lengths.max()))
        input_ids = torch.zeros(len(sequences), len(positions), dtype=torch.long)
        for row, sequence in zip(input_ids, sequences, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        exists = positions < lengths[:, None]
        # a four-dimensional mask is used as it is: 0 where a token may look, -inf at the padding
        mask = torch.zeros(len(sequences), 1, len(positions), len(positions))
        mask.masked_fill_(~exists[:, None, None, :], torch.finfo(torch.float32).min)
        hidden = self.embedding_model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        pooled = exists & (positions >= torch.tensor(num_masked)[:, None])
        x = self.latent_attention_model(hidden) * pooled[..., None]
        return functional.normalize(x.sum(dim=1) / pooled.sum(dim=1, keepdim=True), dim=-1).numpy()

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        sizes = self.sizes
        config = {
            "model_type": "nvembed",
            "torch_dtype": "float32",
            "padding_side": "right",
            "is_mask_instruction": True,
            "add_eos": True,
            "mask_type": "b",
            "latent_attention_config": {
                "num_latents_value": sizes.num_latents_value,
                "num_cross_heads": sizes.num_cross_heads,
                "cross_dim_head": sizes.cross_dim_head,
                "hidden_dim": sizes.hidden_size,
                "latent_dim": sizes.hidden_size,
                "output_normalize": True,
            },
            "text_config": {
                "hidden_act": "silu",
                "hidden_size": sizes.hidden_size,
                "intermediate_size": sizes.intermediate_size,
                "num_attention_heads": sizes.num_attention_heads,
                "num_hidden_layers": sizes.num_hidden_layers,
                "num_key_value_heads": sizes.num_key_value_heads,
                "rms_norm_eps": 1e-5,
                "rope_theta": sizes.rope_theta,
                "vocab_size": sizes.vocab_size,
            },
        }
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(self.state_dict(), folder / "model.safetensors")
