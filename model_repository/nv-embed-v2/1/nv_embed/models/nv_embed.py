"""NV-Embed-v2: bidirectional Mistral layers, latent pooling, and how its texts become tokens.

All that is this model's own is here. Shapes: T tokens of S sequences in one row, P of them pooled, C hidden_size,
L num_latents, X num_cross_heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from nv_embed.models.config_file import Section
from nv_embed.models.mistral import MistralNetwork, MistralSizes, read_sizes, rms_norm, rotary
from nv_embed.models.protocol import Matrix, PackedBatch, Read, Work, mean_shares, parameter
from nv_embed.tokenizer import Template, Tokenizer

# The published model's own query template. The trailing space is part of it.
QUERY_INSTRUCTION = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "
_TEMPLATE = Template(first="<s>", last="</s>", is_instruction_pooled=False)
# The published config.json leaves these out. They are the original's own defaults.
_NUM_LATENTS, _NUM_CROSS_HEADS, _CROSS_HEAD_DIM, _LATENT_DIM = 512, 8, 4096, 4096
_CROSS_ATTENTION = "latent_attention_model.cross_attend_blocks.0."
_MLP = "latent_attention_model.cross_attend_blocks.1."


# --- config.json ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NVEmbedCheckpoint(MistralSizes):
    """What `config.json` says of the network."""

    num_latents: int
    num_cross_heads: int
    cross_head_dim: int
    dtype: str  # of the weights on disk, a torch dtype's name

    @classmethod
    def of_folder(cls, folder: Path) -> NVEmbedCheckpoint:
        """Raises CheckpointError."""
        return cls.read(Section.of_folder(folder))

    @classmethod
    def read(cls, config: Section) -> NVEmbedCheckpoint:
        """Raises CheckpointError naming the key, the value and what is supported."""
        # The published model was trained with these. Another value means another model.
        config.require("model_type", "nvembed")
        config.require("is_mask_instruction", True)
        config.require("add_eos", True)
        config.require("padding_side", "right")
        config.require("mask_type", "b")
        for section in (config, config.section("text_config")):
            if section.raw.get("quantization_config") is not None:
                section.refuse("quantization_config", "null, because only plain weights are known here")
        sizes = read_sizes(config.section("text_config"))
        latent = config.section("latent_attention_config", {})
        for name in ("hidden_dim", "latent_dim"):
            if latent.integer(name, _LATENT_DIM) != sizes.hidden_size:
                latent.refuse(name, f"hidden_size, {sizes.hidden_size}, which is {_LATENT_DIM} unless it is said")
        latent.require("output_normalize", True, is_optional=True)
        return cls(
            **asdict(sizes),
            num_latents=latent.integer("num_latents_value", _NUM_LATENTS),
            num_cross_heads=latent.integer("num_cross_heads", _NUM_CROSS_HEADS),
            cross_head_dim=latent.integer("cross_dim_head", _CROSS_HEAD_DIM),
            dtype=config.dtype(),
        )

    @property
    def dimension(self) -> int:
        return self.hidden_size

    @property
    def pooling(self) -> str:
        return "mean"

    @property
    def query_instruction(self) -> str:
        return QUERY_INSTRUCTION

    @property
    def document_instruction(self) -> str:
        return ""

    @property
    def longest_text(self) -> int:
        return 32768

    def tokenizer(self, folder: Path, max_sequence_tokens: int) -> Tokenizer:
        """Read the folder's tokenizer; raises CheckpointError."""
        return Tokenizer(
            folder / "tokenizer.json", _TEMPLATE, vocab_size=self.vocab_size, max_sequence_tokens=max_sequence_tokens
        )

    def network(self) -> NVEmbedNetwork:
        """Without values, on whatever device is current."""
        return NVEmbedNetwork(self)


# --- network --------------------------------------------------------------------------------------------


class NVEmbedNetwork(MistralNetwork):
    """Packed tokens to one unit vector for each sequence."""

    prefix = "embedding_model."

    def __init__(self, config: NVEmbedCheckpoint) -> None:
        super().__init__(config)
        self.config = config
        self.pooling = LatentPooling(config)

    def rotation(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[T] to cosines and sines [T, 1, D] float32."""
        head_dim = self.config.head_dim
        exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
        return rotary(position_ids, self.config.rope_theta**-exponents)

    def to_vectors(self, x: Tensor, batch: PackedBatch, work: Work) -> Tensor:
        """What the last layer returns, [T, C], to [S, C] float32 rows of length 1."""
        means: tuple[Tensor, ...] = ()
        for rows in work.pieces(len(batch.pooled_indices), self.pooling.multiply_adds):
            pooled = x.index_select(0, batch.pooled_indices[rows])
            outputs = self.pooling(rms_norm(pooled, self.norm, self.config.rms_norm_eps))
            shares = tuple(mean_shares(output, batch.pooled_seqlens, rows) for output in outputs)
            means = tuple(a + b for a, b in zip(means, shares, strict=True)) if means else shares
        mean, mlp_mean = means
        return functional.normalize(mean + self.pooling.out(mlp_mean), dim=-1)

    def places(self) -> Iterator[tuple[str, Tensor]]:
        """Where each published tensor goes that is copied as it is and is no layer's."""
        pooling = self.pooling
        assert pooling.mlp_in.bias is not None
        assert pooling.mlp_out.bias is not None
        yield from super().places()
        yield _CROSS_ATTENTION + "norm.weight", pooling.norm_weight
        yield _CROSS_ATTENTION + "norm.bias", pooling.norm_bias
        yield _MLP + "norm.weight", pooling.mlp_norm_weight
        yield _MLP + "norm.bias", pooling.mlp_norm_bias
        yield _MLP + "fn.net.0.weight", pooling.mlp_in.weight
        yield _MLP + "fn.net.0.bias", pooling.mlp_in.bias
        yield _MLP + "fn.net.2.weight", pooling.mlp_out.weight
        yield _MLP + "fn.net.2.bias", pooling.mlp_out.bias

    def folded_shapes(self) -> dict[str, tuple[int, ...]]:
        """The latents, and the four projections of the cross-attention to them."""
        config = self.config
        hidden_size, cross_size = config.hidden_size, config.num_cross_heads * config.cross_head_dim
        return {
            "latent_attention_model.latents": (config.num_latents, hidden_size),
            _CROSS_ATTENTION + "norm_context.weight": (hidden_size,),
            _CROSS_ATTENTION + "norm_context.bias": (hidden_size,),
            _CROSS_ATTENTION + "fn.to_q.weight": (cross_size, hidden_size),
            _CROSS_ATTENTION + "fn.to_kv.weight": (2 * cross_size, hidden_size),
            _CROSS_ATTENTION + "fn.to_out.weight": (hidden_size, cross_size),
        }

    def fold(self, read: Read) -> None:
        """Fold latents and projections into the pooling's `keys` and `values`, a head at a time.

        With no bias in any of them, (LN(x) Wq^T) (Wk c)^T = LN(x) (c Wk^T Wq)^T, and likewise for values and output.
        In float32 whatever the network's precision; one head of one matrix is all that is on the device beside it.
        """
        config, pooling = self.config, self.pooling
        context = functional.layer_norm(
            read("latent_attention_model.latents"), (config.hidden_size,),
            read(_CROSS_ATTENTION + "norm_context.weight"), read(_CROSS_ATTENTION + "norm_context.bias"),
        )  # fmt: skip
        cross_size = config.num_cross_heads * config.cross_head_dim
        for head in range(config.num_cross_heads):
            rows = slice(head * config.cross_head_dim, (head + 1) * config.cross_head_dim)
            value_rows = slice(cross_size + rows.start, cross_size + rows.stop)  # keys first, then values
            k = context @ read(_CROSS_ATTENTION + "fn.to_kv.weight", rows).T  # [L, cross_head_dim]
            v = context @ read(_CROSS_ATTENTION + "fn.to_kv.weight", value_rows).T
            folded = slice(head * config.num_latents, (head + 1) * config.num_latents)
            scale = config.cross_head_dim**-0.5
            pooling.keys.weight[folded] = k @ read(_CROSS_ATTENTION + "fn.to_q.weight", rows) * scale
            pooling.values.weight[:, folded] = read(_CROSS_ATTENTION + "fn.to_out.weight", slice(None), rows) @ v.T

    def parts_on_tokens(self) -> list[tuple[nn.Module, str]]:
        """The halves of every layer, and the pooling head."""
        return [*super().parts_on_tokens(), (self.pooling, "forward")]


class LatentPooling(nn.Module):
    """Cross-attention from tokens to latents, and a GELU-gated MLP, whose last linear is applied to the mean.

    Two identities make it cheap. The latents are weights, so their keys and values are constants, into which `fold`
    folds the query and output projections: `keys` and `values` stand for four published matrices sixteen times their
    size. And the last linear commutes with the mean, so it runs once for each sequence.
    """

    def __init__(self, config: NVEmbedCheckpoint) -> None:
        super().__init__()
        hidden_size, folded = config.hidden_size, config.num_cross_heads * config.num_latents
        self.num_cross_heads = config.num_cross_heads
        self.multiply_adds = 2 * folded * hidden_size + 8 * hidden_size**2  # of a token
        self.norm_weight, self.norm_bias = parameter(hidden_size), parameter(hidden_size)
        self.keys = Matrix(folded, hidden_size)  # softmax scale included
        self.values = Matrix(hidden_size, folded)
        self.mlp_norm_weight, self.mlp_norm_bias = parameter(hidden_size), parameter(hidden_size)
        self.mlp_in = Matrix(8 * hidden_size, hidden_size, has_bias=True)
        self.mlp_out = Matrix(hidden_size, 4 * hidden_size, has_bias=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [P, C] to [P, C] and the MLP's activations [P, 4 * C]; what is pooled is the mean of both, see `out`."""
        h = functional.layer_norm(x, x.shape[-1:], self.norm_weight, self.norm_bias)
        scores = self.keys(h).view(len(x), self.num_cross_heads, -1)  # [P, X, L]
        attended = scores.softmax(dim=-1, dtype=torch.float32).to(x.dtype).flatten(1)  # [P, X * L]
        x = x + self.values(attended)
        h = functional.layer_norm(x, x.shape[-1:], self.mlp_norm_weight, self.mlp_norm_bias)
        # The value comes first and the gate second, the reverse of the layers' MLP; and GELU is the exact one.
        value, gate = self.mlp_in(h).chunk(2, dim=-1)
        return x, value * functional.gelu(gate)

    def out(self, mlp_mean: Tensor) -> Tensor:
        """The last linear: [S, 4 * C] float32 to what is added to the mean of the tokens, [S, C]."""
        # The input is rounded, not the weight made float32, which would take longer than the product.
        return self.mlp_out(mlp_mean.to(self.mlp_out.weight.dtype))  # type: ignore[no-any-return]
