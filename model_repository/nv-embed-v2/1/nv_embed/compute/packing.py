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

    input_ids: Tensor  # [T] int32
    position_ids: Tensor  # [T] int32, from 0 in every sequence
    cu_seqlens: Tensor  # [S + 1] int32: sequence s is tokens cu_seqlens[s] to cu_seqlens[s + 1]
    max_seqlen: int
    seqlens: tuple[int, ...]  # the lengths again, on the host, where loops and kernel choice need them
    pooled_indices: Tensor  # [P] int32: tokens that are pooled, in order
    pooled_seqlens: tuple[int, ...]  # pooled tokens of each sequence, at least 1


def pack(sequences: Sequence[TokenSequence], device: torch.device) -> PackedBatch:
    """Lay sequences one after the other on a device."""
    assert sequences
    seqlens = tuple(sequence.num_tokens for sequence in sequences)
    cu_seqlens = np.cumsum((0, *seqlens), dtype=np.int32)
    position_ids = np.arange(cu_seqlens[-1], dtype=np.int32) - np.repeat(cu_seqlens[:-1], seqlens)
    num_masked = [sequence.num_masked for sequence in sequences]
    (pooled_indices,) = np.nonzero(position_ids >= np.repeat(num_masked, seqlens))
    parts = [np.concatenate([sequence.input_ids for sequence in sequences]), position_ids, pooled_indices, cu_seqlens]
    # One copy, which nobody waits for: to a GPU each costs more than it carries.
    numbers = torch.from_numpy(np.concatenate(parts, dtype=np.int32, casting="same_kind"))
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    numbers = numbers.to(device, non_blocking=True)
    input_ids, positions, pooled, boundaries = numbers.split_with_sizes([len(part) for part in parts])
    return PackedBatch(
        input_ids=input_ids,
        position_ids=positions,
        cu_seqlens=boundaries,
        max_seqlen=max(seqlens),
        seqlens=seqlens,
        pooled_indices=pooled,
        pooled_seqlens=tuple(n - masked for n, masked in zip(seqlens, num_masked, strict=True)),
    )
