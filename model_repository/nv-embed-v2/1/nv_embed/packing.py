"""Token sequences to one `PackedBatch`: all tokens in one row, no padding; left of it lists, right of it tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nv_embed.tokenizer import TokenSequence


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """S sequences of T tokens in all, P of them pooled."""

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, from 0 in every sequence
    cu_seqlens: Tensor  # [S + 1] int32: sequence s is tokens cu_seqlens[s] to cu_seqlens[s + 1]
    max_seqlen: int
    seqlens: tuple[int, ...]  # the lengths again, on the host, where loops and kernel choice need them
    pooled_indices: Tensor  # [P] int64: tokens that are pooled, in order
    pooled_seqlens: tuple[int, ...]  # pooled tokens of each sequence, at least 1


def pack(sequences: Sequence[TokenSequence], device: torch.device) -> PackedBatch:
    """Lay sequences one after the other on a device."""
    assert sequences
    seqlens = tuple(sequence.num_tokens for sequence in sequences)
    cu_seqlens = np.cumsum((0, *seqlens), dtype=np.int32)
    num_tokens = int(cu_seqlens[-1])
    position_ids = np.arange(num_tokens, dtype=np.int64) - np.repeat(cu_seqlens[:-1], seqlens)
    num_masked = [sequence.num_masked for sequence in sequences]
    (pooled_indices,) = np.nonzero(position_ids >= np.repeat(num_masked, seqlens))

    def on_device(array: np.ndarray) -> Tensor:  # type: ignore[type-arg]
        return torch.from_numpy(array).to(device)

    return PackedBatch(
        input_ids=on_device(np.concatenate([sequence.input_ids for sequence in sequences]).astype(np.int64)),
        position_ids=on_device(position_ids),
        cu_seqlens=on_device(cu_seqlens),
        max_seqlen=max(seqlens),
        seqlens=seqlens,
        pooled_indices=on_device(pooled_indices),
        pooled_seqlens=tuple(n - masked for n, masked in zip(seqlens, num_masked, strict=True)),
    )
