"""The types in which vectors are sent, each made of the float32 vector that was computed; knows no requests."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

_INT8_RANGE = 6.0  # standard deviations of the numbers of a unit vector, if they are spread like noise
_SIGN = np.uint8(128)


class EmbeddingType(Enum):
    """By the names that requests give; all but `float16` have sentence-transformers' and NIM's meaning."""

    FLOAT = "float"  # float32, as computed
    FLOAT16 = "float16"
    INT8 = "int8"  # multiples of one step, which the dimension alone decides: dot products keep their order
    UINT8 = "uint8"  # the same + 128
    BINARY = "binary"  # of `ubinary`, each byte - 128
    UBINARY = "ubinary"  # signs, eight in a byte, the first in its highest bit; zeros fill the last byte

    def __init__(self, name: str) -> None:
        self.output = "embeddings" if name == "float" else f"embeddings_{name}"  # which has vectors of this type

    def num_bytes(self, dimension: int) -> int:
        """Of one vector."""
        match self:
            case EmbeddingType.FLOAT:
                return 4 * dimension
            case EmbeddingType.FLOAT16:
                return 2 * dimension
            case EmbeddingType.INT8 | EmbeddingType.UINT8:
                return dimension
            case _:
                return (dimension + 7) // 8

    def packed(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Unit vectors [N, dim] to [N, dim], or of signs to [N, dim / 8]."""
        match self:
            case EmbeddingType.FLOAT:
                return rows
            case EmbeddingType.FLOAT16:
                return rows.astype(np.float16)
            case EmbeddingType.UBINARY:
                return np.packbits(rows > 0, axis=1)
            case EmbeddingType.BINARY:
                return (np.packbits(rows > 0, axis=1) ^ _SIGN).view(np.int8)
            case _:
                scale = np.float32(127 * math.sqrt(rows.shape[1]) / _INT8_RANGE)
                steps: npt.NDArray[np.float32] = np.rint(rows * scale).clip(-127, 127)
                return steps.astype(np.int8) if self is EmbeddingType.INT8 else (steps + 128).astype(np.uint8)
