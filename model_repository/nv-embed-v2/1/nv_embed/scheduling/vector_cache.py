"""Vectors of texts computed before, within a limit of memory: the least recently used go first.

It holds vectors of one checkpoint, because it lives and dies with the model.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Vector: TypeAlias = npt.NDArray[np.float32]  # [dim]

_ENTRY_BYTES = 320  # of keys, array headers and links beside the vector itself, measured on CPython 3.11


class VectorCache:
    """Key to vector. Not thread-safe: its owner holds a lock."""

    def __init__(self, max_bytes: int) -> None:
        """0 bytes: it stays empty."""
        self._max_bytes = max_bytes
        self._vectors: OrderedDict[bytes, Vector] = OrderedDict()
        self.num_bytes = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._vectors

    def get(self, key: bytes) -> Vector | None:
        """The vector [dim] of a key, if it is still there."""
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, key: bytes, vector: Vector) -> None:
        """Keep a vector [dim] at the cost of older ones. It must be no view, which would keep its whole batch alive."""
        if key in self._vectors or vector.nbytes + _ENTRY_BYTES > self._max_bytes:
            return
        self._vectors[key] = vector
        self.num_bytes += vector.nbytes + _ENTRY_BYTES
        while self.num_bytes > self._max_bytes:
            _, oldest = self._vectors.popitem(last=False)
            self.num_bytes -= oldest.nbytes + _ENTRY_BYTES
