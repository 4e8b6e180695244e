"""A Mistral network with bidirectional attention, in the order in which it computes.

Shapes: T tokens in one row, C hidden_size, H num_heads, K num_kv_heads, D head_dim, I intermediate_size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nv_embed.models.config_file import Section
from nv_embed.models.protocol import Attend, Heads, Matrix, Network, PackedBatch, Work, over_rows, parameter


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


def read_sizes(
    section: Section, *, head_dim: int | None = None, rope_type: str = "default", rope_keys: Collection[str] = ()
) -> MistralSizes:
    """Raises CheckpointError naming the key, the value and what is supported.

    Args:
        section: of config.json.
        head_dim: where it is absent; None: hidden_size / num_attention_heads.
        rope_type: how positions are rotated; another type is refused.
        rope_keys: what may stand in `rope_parameters` because that type knows it.
    """
    section.require("hidden_act", "silu")
    hidden_size = section.integer("hidden_size")
    num_heads, num_kv_heads = section.integer("num_attention_heads"), section.integer("num_key_value_heads")
    head_dim = section.integer("head_dim", head_dim or max(hidden_size // num_heads, 1))
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
        rope_theta=_rope_theta(section, rope_type, rope_keys),
    )


def _rope_theta(section: Section, rope_type: str, rope_keys: Collection[str]) -> float:
    """`rope_theta`, which transformers 5 writes into `rope_parameters`. Other kinds of positions are refused."""
    keys = {"rope_theta", *rope_keys}
    places = [section] if section.raw.get("rope_theta") is not None else []
    for key in ("rope_parameters", "rope_scaling"):
        if section.raw.get(key) is not None:
            inner = section.section(key)
            for name in ("rope_type", "type"):
                inner.require(name, rope_type, is_optional=True)
            if unknown := sorted(inner.raw.keys() - {"rope_type", "type"} - keys):
                inner.refuse(unknown[0], f"nothing: positions are rotated by {', '.join(sorted(keys))} alone")
            places += [inner] if inner.raw.get("rope_theta") is not None else []
    if not places:
        section.refuse("rope_theta", "a positive number, here or in rope_parameters")
    thetas = [place.number("rope_theta") for place in places]
    if len(set(thetas)) > 1:
        places[0].refuse("rope_theta", f"the same as {places[1].name}.rope_theta, {thetas[1]}")
    return thetas[0]


class MistralNetwork(Network):
    """Token vectors, layers and the last norm. How positions rotate and what is pooled is each kind's own."""

    prefix = ""  # of these tensors' names

    def __init__(self, sizes: MistralSizes) -> None:
        super().__init__(sizes.vocab_size, (Layer(sizes) for _ in range(sizes.num_layers)), sizes.heads)
        self.embed_tokens = parameter(sizes.vocab_size, sizes.hidden_size)
        self.norm = parameter(sizes.hidden_size)

    def begin(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """Token vectors [T, C], and `rotation`."""
        return functional.embedding(batch.input_ids, self.embed_tokens), *self.rotation(batch.position_ids)

    def rotation(self, position_ids: Tensor) -> tuple[Tensor, ...]:
        """[T] to cosines and sines for keys, then those for queries if they differ: [T, 1, D] float32 each."""
        raise NotImplementedError

    def places(self) -> Iterator[tuple[str, Tensor]]:
        """Where each published tensor goes that is copied as it is and is no layer's."""
        yield self.prefix + "embed_tokens.weight", self.embed_tokens
        yield self.prefix + "norm.weight", self.norm

    def layer_places(self, number: int) -> Iterator[tuple[str, Tensor]]:
        """The same of one layer."""
        layer = self.layers[number]
        assert isinstance(layer, Layer)
        return ((f"{self.prefix}layers.{number}.{name}", place) for name, place in layer.places())

    def parts_on_tokens(self) -> list[tuple[nn.Module, str]]:
        """The halves of every layer."""
        return [(layer, name) for layer in self.layers for name in ("before_attention", "after_attention")]

    @property
    def numbers_per_token(self) -> int:
        """As many as in a layer."""
        return max((layer.numbers_per_token for layer in self.layers if isinstance(layer, Layer)), default=0)


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

    def forward(self, x: Tensor, batch: PackedBatch, attend: Attend, work: Work, *rotation: Tensor) -> Tensor:
        """x: [T, C] to [T, C]; rotation: see `MistralNetwork.rotation`."""
        q, k, v = over_rows(work, self._before, self.before_attention, x, *rotation)
        attended = attend(q, k, v, batch, work)
        del q, k, v  # long texts have none to spare
        return over_rows(work, self._after, self.after_attention, x, attended)  # type: ignore[no-any-return]

    def before_attention(self, x: Tensor, *rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [T, H, D] and keys [T, K, D], and values [T, K, D]."""
        sizes = self.sizes
        h = rms_norm(x, self.input_norm, sizes.rms_norm_eps)
        heads = (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
        qkv = self.qkv(h).view(len(x), -1, sizes.head_dim)
        if len(rotation) == 2:  # the same of queries and keys, so all heads at once
            q, k = rotate(qkv[:, : -sizes.num_kv_heads], *rotation).split_with_sizes(heads[:2], dim=1)
            return q, k, qkv[:, -sizes.num_kv_heads :]
        q, k, v = qkv.split_with_sizes(heads, dim=1)
        return rotate(q, *rotation[2:]), rotate(k, *rotation[:2]), v

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
        """Input, queries, keys and values, and what attention returns; later the output in the place of some.

        And up to four rotations, whose float32 numbers count double.
        """
        sizes = self.sizes
        return sizes.hidden_size + (2 * (sizes.num_heads + sizes.num_kv_heads) + 8) * sizes.head_dim


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [T, C]."""
    # torch accumulates the squares of half-precision input in float32
    return functional.rms_norm(x, x.shape[-1:], weight, eps)


def rotary(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions, as `rotate` wants them: [T] and [D / 2] to [T, 1, D] float32."""
    angles = position_ids.float()[:, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the half-split layout: element i is paired with i + D / 2. x: [T, heads, D]."""
    exact = x.float()
    return (exact * cos).addcmul_(exact.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)
