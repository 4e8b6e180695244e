"""The student: NV-Embed-v2's architecture made small, its parameters under the published names.

Its state dict is the checkpoint. Training differs from serving in form only: rows are padded and masked instead of
packed, and the pooling head stays unfolded so that every published weight is trained.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from batching import padded
from product import CheckpointConfig
from safetensors.torch import save_file
from torch import Tensor, nn


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, c: CheckpointConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(c.hidden_size, c.hidden_size) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = (
            p(x).view(rows, length, -1, self.c.head_dim).transpose(1, 2)  # [B, heads, T, head_dim]
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        # No causal mask, at any length. Written out: on a CPU, with rows this short, the fused kernel trains slower.
        scores = q @ k.transpose(-1, -2) * self.c.head_dim**-0.5  # [B, heads, T, T]
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e4)
        out = torch.softmax(scores, dim=-1).to(v.dtype) @ v
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))


class GatedMLP(nn.Module):
    def __init__(self, c: CheckpointConfig) -> None:
        super().__init__()
        self.gate_proj = linear(c.hidden_size, c.intermediate_size)
        self.up_proj = linear(c.hidden_size, c.intermediate_size)
        self.down_proj = linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: CheckpointConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = SelfAttention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = GatedMLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Encoder(nn.Module):
    def __init__(self, c: CheckpointConfig) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        half = torch.arange(0, self.c.head_dim, 2, device=input_ids.device) / self.c.head_dim
        angles = torch.arange(input_ids.shape[1], device=input_ids.device)[:, None] / self.c.rope_theta**half
        cos, sin = angles.cos(), angles.sin()  # [T, head_dim / 2]
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)


class CrossAttention(nn.Module):
    def __init__(self, c: CheckpointConfig) -> None:
        super().__init__()
        self.heads = c.num_cross_heads
        inner = c.num_cross_heads * c.cross_head_dim
        self.to_q = linear(c.hidden_size, inner)
        self.to_kv = linear(c.hidden_size, 2 * inner)
        self.to_out = linear(inner, c.hidden_size)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x: [N, C] tokens; context: [latents, C]."""
        k, v = self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(0, 1) for t in (self.to_q(x), k, v))
        out = torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=-1).to(v.dtype) @ v  # [heads, N, width]
        return self.to_out(out.transpose(0, 1).flatten(1))


class FeedForward(nn.Module):
    def __init__(self, c: CheckpointConfig) -> None:
        super().__init__()
        # Slot 1 is the activation, which has no weights: the published names count it.
        self.net = nn.ModuleList([
            nn.Linear(c.hidden_size, 8 * c.hidden_size), nn.Identity(), nn.Linear(4 * c.hidden_size, c.hidden_size),
        ])  # fmt: skip

    def activations(self, x: Tensor) -> Tensor:
        value, gate = self.net[0](x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class Block(nn.Module):
    """A function and the norm of what it reads, in the places that the published names give them."""

    def __init__(self, fn: nn.Module, size: int) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(size)


class LatentPooling(nn.Module):
    def __init__(self, c: CheckpointConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(c.num_latents, c.hidden_size))
        attend, feed = Block(CrossAttention(c), c.hidden_size), Block(FeedForward(c), c.hidden_size)
        attend.norm_context = nn.LayerNorm(c.hidden_size)
        self.cross_attend_blocks = nn.ModuleList([attend, feed])

    def forward(self, x: Tensor, texts: Tensor, counts: Tensor) -> Tensor:
        """x: [N, C] tokens, texts: [N] which of the B texts each is of, B for none, counts: [B] -> [B, C] fp32."""
        attend, feed = self.cross_attend_blocks
        h = x + attend.fn(attend.norm(x), attend.norm_context(self.latents))
        activations = feed.fn.activations(feed.norm(h))
        mean_h, mean_a = (
            torch.zeros(len(counts) + 1, t.shape[1], device=x.device).index_add(0, texts, t.float())[:-1]
            / counts[:, None]
            for t in (h, activations)
        )
        # The last linear map and the mean commute: once per text instead of once per token.
        return F.normalize(mean_h + feed.fn.net[2](mean_a).float(), dim=-1)


class Student(nn.Module):
    def __init__(self, c: CheckpointConfig) -> None:
        super().__init__()
        self.embedding_model = Encoder(c)
        self.latent_attention_model = LatentPooling(c)
        for name, p in self.named_parameters():
            if p.dim() == 2 and "latents" not in name:
                nn.init.normal_(p, std=0.6 * p.shape[1] ** -0.5)

    def forward(self, rows: list[list[int]], num_masked: list[int]) -> Tensor:
        """Token rows and where pooling starts in each -> unit vectors [len(rows), C] fp32."""
        device = self.embedding_model.embed_tokens.weight.device
        width = padded(max(map(len, rows)))
        input_ids = torch.tensor([row + [2] * (width - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)[:, None]
        position = torch.arange(width, device=device)[None]
        real = position < lengths
        mask = None if bool(real.all()) else real[:, None, None, :]
        hidden = self.embedding_model(input_ids, mask)
        keep = real & (position >= torch.tensor(num_masked, device=device)[:, None])
        kept = keep.flatten().nonzero()[:, 0]  # what is not pooled is not computed
        # As with `padded`, few different counts: some more tokens, which belong to no text.
        spare = (0, -len(kept) % 128)
        texts = F.pad(kept // width, spare, value=len(rows))
        return self.latent_attention_model(hidden.flatten(0, 1).index_select(0, F.pad(kept, spare)), texts, keep.sum(1))

    def save(self, folder: Path) -> None:
        """model.safetensors, in fp16."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: p.detach().to("cpu", torch.float16).contiguous() for name, p in self.state_dict().items()}
        for name, weight in weights.items():
            assert weight.abs().max() < 1000, f"{name} leaves no room for fp16 arithmetic"  # false for NaN, too
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)  # the library's files are their owner's alone
