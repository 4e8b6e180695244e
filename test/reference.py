"""Random checkpoints in the published form, and the vectors that the baseline's network makes of them.

That network, padded and masked, on `transformers`' own Mistral layers and with the latent head unfolded, shares no code
with the product; the original's vectors are asked of it in test_benchmarks.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from nv_embed.models.config_file import Section
from nv_embed.models.nv_embed import NVEmbedCheckpoint
from padded import PaddedNetwork
from safetensors.torch import save_file
from synthetic import published_config, random_weights


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


class Reference:
    """A checkpoint in float32, its weights larger than those of a network at birth, so that every one matters."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        values = vars(sizes).copy()
        latent = {name: values.pop(name) for name in ("num_latents_value", "num_cross_heads", "cross_dim_head")}
        self._config = published_config(values, latent, "float32")
        config = NVEmbedCheckpoint.read(Section(self._config))
        self._weights = random_weights(config, torch.device("cpu"), torch.float32, seed, spread=0.15)

    def embed(self, sequences: Sequence[Sequence[int]], num_masked: Sequence[int]) -> np.ndarray:
        """[S, C]: all sequences padded on the right to the longest, in one forward pass."""
        return PaddedNetwork(self._config, self._weights).embed(sequences, num_masked).numpy()

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        (folder / "config.json").write_text(json.dumps(self._config), encoding="utf-8")
        save_file(self._weights, folder / "model.safetensors")
