"""A text as the network sees it; knows neither torch nor the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """A tokenized text."""

    input_ids: npt.NDArray[np.int32]  # [num_tokens], instruction and special tokens included
    num_masked: int  # leading tokens left out of the pooling; always less than num_tokens
    is_truncated: bool = False  # whether the text was too long and was cut

    @property
    def num_tokens(self) -> int:
        """What it costs."""
        return len(self.input_ids)

    def digest(self) -> bytes:
        """16 bytes; another sequence has the same only if it has the same vector."""
        return blake2b(self.input_ids.tobytes() + self.num_masked.to_bytes(8, "little"), digest_size=16).digest()
