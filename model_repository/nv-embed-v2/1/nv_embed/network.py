"""The network in reading order: bidirectional Mistral, latent pooling, normalization; knows no files and no texts.

Shapes: T tokens of S sequences packed in one row, P of them pooled, C hidden_size, H num_heads, K num_kv_heads,
D head_dim, I intermediate_size, L num_latents, X num_cross_heads. Built on whatever device is current, unfilled;
`weights.py` fills it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from nv_embed.compute.attention import Attend, attend_each
from nv_embed.compute.packing import PackedBatch
from nv_embed.config import CheckpointConfig


class Network(nn.Module):
    """Packed tokens to one unit vector for each sequence."""

    def __init__(self, config: CheckpointConfig) -> None:
        super().__init__()
        self.config = config
        self.attend: Attend = attend_each
        self.embed_tokens = _parameter(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = _parameter(config.hidden_size)
        self.pooling = LatentPooling(config)

    def forward(self, batch: PackedBatch, about_to_end: Callable[[], None] | None = None) -> Tensor:
        """Returns [S, C] float32 rows of length 1; `about_to_end` is called where little is left to compute."""
        x, cos, sin = self.begin(batch)
        for number, layer in enumerate(self.layers):
            if about_to_end and number == self.config.num_layers * 7 // 8:
                about_to_end()
            x = layer(x, cos, sin, batch, self.attend)
        return self.to_vectors(x, batch)

    def begin(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """What the first layer reads: token vectors [T, C], cosines and sines of positions [T, 1, D / 2] float32."""
        head_dim = self.config.head_dim
        exponents = torch.arange(0, head_dim, 2, device=batch.position_ids.device, dtype=torch.float32) / head_dim
        angles = batch.position_ids.float()[:, None, None] * self.config.rope_theta**-exponents
        return functional.embedding(batch.input_ids, self.embed_tokens), angles.cos(), angles.sin()

    def to_vectors(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """What the last layer returns, [T, C], to unit vectors [S, C] float32."""
        return self.pool(*self.head(x, batch.pooled_indices), batch.pooled_seqlens)

    def head(self, x: Tensor, pooled_indices: Tensor) -> tuple[Tensor, Tensor]:
        """All that is left for each token: [T, C] to what is averaged over each sequence, [P, C] and [P, 4 * C]."""
        x, mlp = self.pooling(_rms_norm(x.index_select(0, pooled_indices), self.norm, self.config.rms_norm_eps))
        return x, mlp

    def pool(self, x: Tensor, mlp: Tensor, pooled_seqlens: tuple[int, ...]) -> Tensor:
        """What `head` returns, to unit vectors [S, C] float32."""
        return functional.normalize(self.pooling.mean(x, mlp, pooled_seqlens), dim=-1)


class Matrix(nn.Module):
    """One of a layer's matrices; `precision.py` has others to put in its place."""

    def __init__(self, num_outputs: int, num_inputs: int) -> None:
        super().__init__()
        self.weight = _parameter(num_outputs, num_inputs)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, inputs] to [T, outputs]."""
        return functional.linear(x, self.weight)


class Layer(nn.Module):
    """One pre-norm layer: attention over the whole sequence, then the SiLU-gated MLP."""

    def __init__(self, config: CheckpointConfig) -> None:
        super().__init__()
        self.config = config
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.input_norm = _parameter(config.hidden_size)
        self.qkv = Matrix(q_size + 2 * kv_size, config.hidden_size)
        self.o = Matrix(config.hidden_size, q_size)
        self.post_attention_norm = _parameter(config.hidden_size)
        self.gate_up = Matrix(2 * config.intermediate_size, config.hidden_size)
        self.down = Matrix(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: PackedBatch, attend: Attend) -> Tensor:
        """x: [T, C] to [T, C]."""
        return self.after_attention(x, attend(*self.before_attention(x, cos, sin), batch))

    def before_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [T, H, D] and keys [T, K, D], and values [T, K, D]."""
        config = self.config
        h = _rms_norm(x, self.input_norm, config.rms_norm_eps)
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        q, k, v = self.qkv(h).view(len(x), -1, config.head_dim).split_with_sizes(heads, dim=1)
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """x: [T, C], attended: [T, H, D] to [T, C]."""
        x = x + self.o(attended.flatten(1))
        h = _rms_norm(x, self.post_attention_norm, self.config.rms_norm_eps)
        gate, up = self.gate_up(h).chunk(2, dim=-1)  # [T, I] each
        return x + self.down(functional.silu(gate) * up)  # type: ignore[no-any-return]


class LatentPooling(nn.Module):
    """Cross-attention from tokens to latents, a GELU-gated MLP, and the mean over each sequence.

    Two identities make it cheap. The latents are weights, so their keys and values are constants, into which
    `weights.py` folds the query and output projections: `keys` and `values` stand for four published matrices
    sixteen times their size. And the last linear commutes with the mean, so it runs once for each sequence.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        super().__init__()
        hidden_size, folded = config.hidden_size, config.num_cross_heads * config.num_latents
        self.num_cross_heads = config.num_cross_heads
        self.norm_weight, self.norm_bias = _parameter(hidden_size), _parameter(hidden_size)
        self.keys = _parameter(folded, hidden_size)  # softmax scale included
        self.values = _parameter(folded, hidden_size)
        self.mlp_norm_weight, self.mlp_norm_bias = _parameter(hidden_size), _parameter(hidden_size)
        self.mlp_in_weight, self.mlp_in_bias = (
            _parameter(8 * hidden_size, hidden_size),
            _parameter(8 * hidden_size),
        )
        self.mlp_out_weight, self.mlp_out_bias = (
            _parameter(hidden_size, 4 * hidden_size),
            _parameter(hidden_size),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [P, C] to [P, C] and the MLP's activations [P, 4 * C]."""
        h = functional.layer_norm(x, x.shape[-1:], self.norm_weight, self.norm_bias)
        scores = functional.linear(h, self.keys).view(len(x), self.num_cross_heads, -1)  # [P, X, L]
        attended = scores.softmax(dim=-1, dtype=torch.float32).to(x.dtype).flatten(1)  # [P, X * L]
        x = x + attended @ self.values
        h = functional.layer_norm(x, x.shape[-1:], self.mlp_norm_weight, self.mlp_norm_bias)
        # The value comes first and the gate second, the reverse of the layers' MLP; and GELU is the exact one.
        value, gate = functional.linear(h, self.mlp_in_weight, self.mlp_in_bias).chunk(2, dim=-1)
        return x, value * functional.gelu(gate)

    def mean(self, x: Tensor, mlp: Tensor, pooled_seqlens: tuple[int, ...]) -> Tensor:
        """What `forward` returns, to [S, C] float32."""
        mlp = _mean(mlp, pooled_seqlens).to(x.dtype)  # not the weight to float32: that would take longer than this
        return _mean(x, pooled_seqlens) + functional.linear(mlp, self.mlp_out_weight, self.mlp_out_bias)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # torch accumulates the squares of half-precision input in float32
    return functional.rms_norm(x, x.shape[-1:], weight, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the half-split layout: element i is paired with i + D / 2. x: [T, heads, D]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _mean(x: Tensor, seqlens: tuple[int, ...]) -> Tensor:
    """Mean of each sequence's rows in float32: [P, N] to [S, N]."""
    return torch.stack([rows.mean(dim=0, dtype=torch.float32) for rows in x.split_with_sizes(seqlens)])
