"""The types of vectors that a server sends, by the names that requests give them."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

EmbeddingType: TypeAlias = Literal["float", "float16", "int8", "uint8", "binary", "ubinary"]
Embeddings: TypeAlias = npt.NDArray[Any]
"""[n, dim]: float32 rows of length 1, or what another type makes of them. Of "binary" and "ubinary" [n, dim / 8]."""

EMBEDDING_TYPES: tuple[EmbeddingType, ...] = get_args(EmbeddingType)
# The server's name of the numbers, and numpy's.
NUMBERS: dict[EmbeddingType, tuple[str, npt.DTypeLike]] = {
    "float": ("FP32", np.float32),
    "float16": ("FP16", np.float16),
    "int8": ("INT8", np.int8),
    "uint8": ("UINT8", np.uint8),
    "binary": ("INT8", np.int8),
    "ubinary": ("UINT8", np.uint8),
}


def packed(rows: npt.NDArray[np.float32], embedding_type: EmbeddingType) -> Embeddings:
    """What a server makes of unit vectors [n, dim]: for those that were stored as float32.

    Args:
        rows: as the server sent them.
        embedding_type: "int8" are whole steps of 6 / (127 sqrt(dim)), cut to -127 ... 127, and "uint8" the same + 128.
            "ubinary" are signs, eight in a byte, the first in its highest bit, and "binary" the same bytes - 128.
    """
    match embedding_type:
        case "float":
            return rows
        case "float16":
            return rows.astype(np.float16)
        case "ubinary":
            return np.packbits(rows > 0, axis=1)
        case "binary":
            return (np.packbits(rows > 0, axis=1) ^ np.uint8(128)).view(np.int8)
    steps: npt.NDArray[np.float32] = np.rint(rows * np.float32(127 * math.sqrt(rows.shape[1]) / 6)).clip(-127, 127)
    return steps.astype(np.int8) if embedding_type == "int8" else (steps + 128).astype(np.uint8)
