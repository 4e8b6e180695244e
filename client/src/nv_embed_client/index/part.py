"""What a store keeps of a passage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nv_embed_client.index.passages import digest_of


class Key(NamedTuple):
    """A passage as it was cut from its file. If the model would have cut it, the store has parts of it."""

    file: str
    """Relative to the folder that holds the store, with slashes: both can be moved together."""
    line: int
    digest: str


@dataclass(frozen=True, slots=True)
class Part:
    """What is embedded of a passage: all of it, or a part."""

    key: Key
    line: int
    text: str
    vector: npt.NDArray[np.float16]
    """[dim], of length 1."""

    @property
    def id(self) -> str:
        """The same in each run, so that no run adds a part twice."""
        return f"{self.key.file}:{self.key.line}:{self.key.digest}:{self.line}:{digest_of(self.text)}"
