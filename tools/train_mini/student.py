"""The student: NV-Embed-v2's architecture made small, its parameters under the published names.

The student's state dict is the checkpoint. Training differs from serving in form and precision: rows are padded and
masked instead of packed, the pooling head stays unfolded so that every published weight is trained, products are in
bfloat16.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from product import CheckpointConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MistralConfig, MistralModel


def padded(length: int) -> int:
    """The width of rows of at most that many tokens: up to an eighth more, of which each doubling has but eight.

    On a CPU each new shape of a half-precision product is compiled. With a shape for every length that took a third of
    the time.
    """
    step = 1 << max(0, length.bit_length() - 4)
    return -(-length // step) * step


def by_length(rows: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Indices of rows in batches, shortest first, of at most `max_tokens` with padding.

    A row of more than that is a batch by itself.
    """
    made: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if not made or (len(made[-1]) + 1) * padded(len(rows[i])) > max_tokens:
            made.append([])
        made[-1].append(i)
    return made


class CrossAttention(nn.Module):
    """Every token attends to the latents."""

    def __init__(self, c: CheckpointConfig) -> None:
        super().__init__()
        self.heads = c.num_cross_heads
        inner = c.num_cross_heads * c.cross_head_dim
        self.to_q = nn.Linear(c.hidden_size, inner, bias=False)
        self.to_kv = nn.Linear(c.hidden_size, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, c.hidden_size, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x: [N, C] tokens; context: [latents, C]."""
        k, v = self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(0, 1) for t in (self.to_q(x), k, v))
        out = torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=-1).to(v.dtype) @ v  # [heads, N, width]
        return self.to_out(out.transpose(0, 1).flatten(1))


class LatentPooling(nn.Module):
    """Attention to the latents and an MLP, nested as the published names are."""

    def __init__(self, c: CheckpointConfig) -> None:
        super().__init__()
        size = c.hidden_size
        self.latents = nn.Parameter(torch.randn(c.num_latents, size))
        attend = {"fn": CrossAttention(c), "norm": nn.LayerNorm(size), "norm_context": nn.LayerNorm(size)}
        # The activation has number 1 in the published names.
        net = [nn.Linear(size, 8 * size), nn.Identity(), nn.Linear(4 * size, size)]
        feed = {"fn": nn.ModuleDict({"net": nn.ModuleList(net)}), "norm": nn.LayerNorm(size)}
        self.cross_attend_blocks = nn.ModuleList([nn.ModuleDict(attend), nn.ModuleDict(feed)])

    def forward(self, x: Tensor, texts: Tensor, counts: Tensor) -> Tensor:
        """x: [N, C] tokens, texts: [N] which of the B texts each is of, B for none, counts: [B] -> [B, C] fp32."""
        attend, feed = self.cross_attend_blocks
        h = x + attend.fn(attend.norm(x), attend.norm_context(self.latents))
        value, gate = feed.fn.net[0](feed.norm(h)).chunk(2, dim=-1)
        activations = value * F.gelu(gate)
        mean_h, mean_a = (
            torch.zeros(len(counts) + 1, t.shape[1], device=x.device).index_add(0, texts, t.float())[:-1]
            / counts[:, None]
            for t in (h, activations)
        )
        # The last linear map and the mean commute: once per text instead of once per token.
        return F.normalize(mean_h + feed.fn.net[2](mean_a).float(), dim=-1)


class Student(nn.Module):
    """Token rows -> unit vectors."""

    def __init__(self, c: CheckpointConfig) -> None:
        super().__init__()
        sizes = MistralConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
            rms_norm_eps=c.rms_norm_eps, rope_theta=c.rope_theta, initializer_range=0.03,
        )  # fmt: skip
        # On a CPU, with rows this short, the fused kernel trains slower than attention written out.
        self.embedding_model = MistralModel._from_config(sizes, attn_implementation="eager")
        self.latent_attention_model = LatentPooling(c)

    @property
    def token_vectors(self) -> nn.Embedding:
        return self.embedding_model.embed_tokens

    def forward(self, rows: list[list[int]], num_masked: list[int]) -> Tensor:
        """Token rows and where pooling starts in each -> unit vectors [len(rows), C] fp32."""
        encoder, device = self.embedding_model, self.token_vectors.weight.device
        width = padded(max(map(len, rows)))
        input_ids = torch.tensor([row + [2] * (width - len(row)) for row in rows], device=device)  # </s>
        lengths = torch.tensor([len(row) for row in rows], device=device)[:, None]
        position = torch.arange(width, device=device)[None]
        real = position < lengths
        # Called one by one the layers have no causal mask, at any length.
        mask = None if bool(real.all()) else torch.where(real, 0.0, -1e4)[:, None, None, :]
        hidden = self.token_vectors(input_ids)
        rotation = encoder.rotary_emb(hidden, position)
        for layer in encoder.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotation)
        keep = real & (position >= torch.tensor(num_masked, device=device)[:, None])
        kept = keep.flatten().nonzero()[:, 0]  # what is not pooled is not computed
        # As with `padded`, few different counts: some more tokens, which belong to no text.
        spare = (0, -len(kept) % 128)
        texts = F.pad(kept // width, spare, value=len(rows))
        pooled = encoder.norm(hidden).flatten(0, 1).index_select(0, F.pad(kept, spare))
        return self.latent_attention_model(pooled, texts, keep.sum(1))

    def save(self, folder: Path) -> None:
        """model.safetensors, in fp16."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: p.half() for name, p in self.state_dict().items()}
        for name, weight in weights.items():
            assert weight.abs().max() < 1000, f"{name} leaves no room for fp16 arithmetic"  # false for NaN, too
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)  # the library's files are their owner's alone
