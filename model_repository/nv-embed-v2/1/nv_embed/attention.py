"""Attention of every sequence of a packed row over itself; the only file that knows kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def attend(q: Tensor, k: Tensor, v: Tensor, seqlens: Sequence[int]) -> Tensor:
    """Full, bidirectional, grouped-query attention within each sequence; softmax scale head_dim ** -0.5.

    Args:
        q: [T, num_heads, head_dim]
        k, v: [T, num_kv_heads, head_dim]
        seqlens: tokens of each sequence, T in all.

    Returns:
        [T, num_heads, head_dim]
    """
    out = torch.empty_like(q)
    start = 0
    for seqlen in seqlens:
        rows = slice(start, start + seqlen)
        # [1, heads, seqlen, head_dim]: SDPA wants the sequence next to last
        out[rows] = functional.scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None], k[rows].transpose(0, 1)[None], v[rows].transpose(0, 1)[None],
            enable_gqa=True,
        )[0].transpose(0, 1)  # fmt: skip
        start += seqlen
    return out
