"""Vectors of texts computed before, within a limit of memory: the least recently used go first.

One checkpoint's: a cache lives and dies with the model.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

_ENTRY_BYTES = 320  # of keys, array headers and links beside the vector itself, measured on CPython 3.11


class VectorCache:
    """Key to vector. Holds what was computed completely and nothing else. Not thread-safe: its owner holds a lock."""

    def __init__(self, max_bytes: int) -> None:
        """0 bytes: it stays empty."""
        self._max_bytes = max_bytes
        self._vectors: OrderedDict[bytes, npt.NDArray[np.float32]] = OrderedDict()
        self.num_bytes = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._vectors

    def get(self, key: bytes) -> npt.NDArray[np.float32] | None:
        """The vector [dim] of a key, if it is still there."""
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, key: bytes, vector: npt.NDArray[np.float32]) -> None:
        """Keep a copy of a vector [dim], at the cost of older ones."""
        if key in self._vectors or vector.nbytes + _ENTRY_BYTES > self._max_bytes:
            return
        self._vectors[key] = vector.copy()  # a view would keep its whole batch alive
        self.num_bytes += vector.nbytes + _ENTRY_BYTES
        while self.num_bytes > self._max_bytes:
            _, oldest = self._vectors.popitem(last=False)
            self.num_bytes -= oldest.nbytes + _ENTRY_BYTES
