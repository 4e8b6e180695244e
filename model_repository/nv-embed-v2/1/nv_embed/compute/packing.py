"""Token sequences to one `PackedBatch`: all tokens in one row, without padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nv_embed.models.protocol import PackedBatch
from nv_embed.sequence import TokenSequence


def pack(sequences: Sequence[TokenSequence], device: torch.device) -> PackedBatch:
    """Lay sequences one after the other on a device."""
    assert sequences
    seqlens = tuple(sequence.num_tokens for sequence in sequences)
    cu_seqlens = np.cumsum((0, *seqlens), dtype=np.int32)
    position_ids = np.arange(cu_seqlens[-1], dtype=np.int32) - np.repeat(cu_seqlens[:-1], seqlens)
    num_masked = [sequence.num_masked for sequence in sequences]
    (pooled_indices,) = np.nonzero(position_ids >= np.repeat(num_masked, seqlens))
    parts = [np.concatenate([sequence.input_ids for sequence in sequences]), position_ids, pooled_indices, cu_seqlens]
    # In one copy that nobody waits for, because starting a copy to a GPU takes longer than carrying so little.
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
