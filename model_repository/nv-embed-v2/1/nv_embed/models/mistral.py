"""A Mistral network's layers with bidirectional attention, in the order in which they compute.

Shapes: T tokens in one row, C hidden_size, H num_heads, K num_kv_heads, D head_dim, I intermediate_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nv_embed.models.config_file import Section
from nv_embed.models.protocol import Attend, Heads, Matrix, PackedBatch, Work, over_rows, parameter


@dataclass(frozen=True, slots=True)
class MistralSizes:
    """What config.json says of the layers. `sliding_window` is ignored, as by the original NV-Embed-v2."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float

    @property
    def heads(self) -> Heads:
        return Heads(self.num_heads, self.num_kv_heads, self.head_dim)


def read_sizes(section: Section) -> MistralSizes:
    """Raises CheckpointError naming the key, the value and what is supported."""
    section.require("hidden_act", "silu")
    hidden_size = section.integer("hidden_size")
    num_heads, num_kv_heads = section.integer("num_attention_heads"), section.integer("num_key_value_heads")
    head_dim = section.integer("head_dim", max(hidden_size // num_heads, 1))
    if num_heads % num_kv_heads:
        section.refuse("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}")
    if head_dim % 2:
        section.refuse("head_dim", f"an even number (hidden_size {hidden_size} and {num_heads} heads make {head_dim})")
    return MistralSizes(
        vocab_size=section.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=section.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=section.integer("intermediate_size"),
        rms_norm_eps=section.number("rms_norm_eps"),
        rope_theta=_rope_theta(section),
    )


def _rope_theta(section: Section) -> float:
    """`rope_theta`, which transformers 5 writes into `rope_parameters`. Other kinds of positions are refused."""
    places = [section] if section.raw.get("rope_theta") is not None else []
    for key in ("rope_parameters", "rope_scaling"):
        if section.raw.get(key) is not None:
            inner = section.section(key)
            for name in ("rope_type", "type"):
                inner.require(name, "default", is_optional=True)
            if unknown := sorted(inner.raw.keys() - {"rope_type", "type", "rope_theta"}):
                inner.refuse(unknown[0], "nothing: positions are rotated by rope_theta alone")
            places += [inner] if inner.raw.get("rope_theta") is not None else []
    if not places:
        section.refuse("rope_theta", "a positive number, here or in rope_parameters")
    thetas = [place.number("rope_theta") for place in places]
    if len(set(thetas)) > 1:
        places[0].refuse("rope_theta", f"the same as {places[1].name}.rope_theta, {thetas[1]}")
    return thetas[0]


class Layer(nn.Module):
    """One pre-norm layer: attention over the whole sequence, then the SiLU-gated MLP."""

    def __init__(self, sizes: MistralSizes) -> None:
        super().__init__()
        self.sizes = sizes
        q_size, kv_size = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        self.input_norm = parameter(sizes.hidden_size)
        self.qkv = Matrix(q_size + 2 * kv_size, sizes.hidden_size)
        self.o = Matrix(sizes.hidden_size, q_size)
        self.post_attention_norm = parameter(sizes.hidden_size)
        self.gate_up = Matrix(2 * sizes.intermediate_size, sizes.hidden_size)
        self.down = Matrix(sizes.hidden_size, sizes.intermediate_size)
        self._before = sizes.hidden_size * (q_size + 2 * kv_size)  # multiply-adds of a token
        self._after = sizes.hidden_size * (q_size + 3 * sizes.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: PackedBatch, attend: Attend, work: Work) -> Tensor:
        """x: [T, C], cos and sin: [T, 1, D / 2] to [T, C]."""
        q, k, v = over_rows(work, self._before, self.before_attention, x, cos, sin)
        attended = attend(q, k, v, batch, work)
        del q, k, v  # long texts have none to spare
        return over_rows(work, self._after, self.after_attention, x, attended)  # type: ignore[no-any-return]

    def before_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [T, H, D] and keys [T, K, D], and values [T, K, D]."""
        sizes = self.sizes
        h = rms_norm(x, self.input_norm, sizes.rms_norm_eps)
        heads = (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
        q, k, v = self.qkv(h).view(len(x), -1, sizes.head_dim).split_with_sizes(heads, dim=1)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """x: [T, C], attended: [T, H, D] to [T, C]."""
        x = x + self.o(attended.flatten(1))
        h = rms_norm(x, self.post_attention_norm, self.sizes.rms_norm_eps)
        gate, up = self.gate_up(h).chunk(2, dim=-1)  # [T, I] each
        return x + self.down(functional.silu(gate) * up)  # type: ignore[no-any-return]

    def places(self) -> Iterator[tuple[str, Tensor]]:
        """Where each tensor of one published layer goes: a parameter, or its rows of a fused one."""
        sizes = self.sizes
        kv_size = sizes.num_kv_heads * sizes.head_dim
        q, k, v = self.qkv.weight.split_with_sizes((sizes.num_heads * sizes.head_dim, kv_size, kv_size))
        gate, up = self.gate_up.weight.chunk(2)
        yield "input_layernorm.weight", self.input_norm
        yield "self_attn.q_proj.weight", q
        yield "self_attn.k_proj.weight", k
        yield "self_attn.v_proj.weight", v
        yield "self_attn.o_proj.weight", self.o.weight
        yield "post_attention_layernorm.weight", self.post_attention_norm
        yield "mlp.gate_proj.weight", gate
        yield "mlp.up_proj.weight", up
        yield "mlp.down_proj.weight", self.down.weight

    @property
    def numbers_per_token(self) -> int:
        """Input, queries, keys and values, and what attention returns; later the output in the place of some."""
        sizes = self.sizes
        return sizes.hidden_size + 2 * (sizes.num_heads + sizes.num_kv_heads) * sizes.head_dim


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [T, C]."""
    # torch accumulates the squares of half-precision input in float32
    return functional.rms_norm(x, x.shape[-1:], weight, eps)


def rotary(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions: [T] to [T, 1, D / 2] float32."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids.float()[:, None, None] * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the half-split layout: element i is paired with i + D / 2. x: [T, heads, D]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
