"""The engine for a batcher that chooses its batch before it asks to compute it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from nv_embed.sequence import TokenSequence


class TurnEngine:
    """Takes a batch that is chosen already, and is done when `start` returns."""

    turn = nullcontext()

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def start(self, sequences: Sequence[TokenSequence]) -> Any:
        """Returns what returns vectors and seconds."""
        computed = self._engine.compute(lambda: sequences)
        return lambda: (computed.vectors, computed.seconds)
