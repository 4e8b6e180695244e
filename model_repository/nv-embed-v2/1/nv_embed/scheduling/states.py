"""What the ledger keeps of a request, of its texts and of a batch; no behaviour."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeAlias

from nv_embed.requests import EmbedRequest
from nv_embed.scheduling.answers import Outcome, Reply
from nv_embed.scheduling.fair_queue import Flow
from nv_embed.scheduling.vector_cache import Vector
from nv_embed.sequence import TokenSequence


@dataclass(slots=True, eq=False)
class Request:
    """A request on its way."""

    spec: EmbedRequest
    reply: Reply
    arrived: float
    flow: Flow
    texts: list[Text] = field(default_factory=list)  # tokenized so far, in input order
    num_tokens: int = 0
    num_new_tokens: int = 0  # of texts that the cache did not hold when they were tokenized
    num_missing: int = 0  # texts without a vector, once all are tokenized
    num_queue_tokens: int = 0  # of its texts that wait to be computed
    is_tokenized: bool = False
    is_started: bool = False
    is_finished: bool = False
    next_question: float = 0.0  # when to ask whether it is cancelled

    @property
    def kind(self) -> str:
        """As metrics have it."""
        return "query" if self.spec.is_query else "documents"


@dataclass(slots=True, eq=False)
class Text:
    """One text of a request."""

    request: Request
    index: int
    sequence: TokenSequence
    key: bytes
    vector: Vector | None = None


@dataclass(slots=True, eq=False)
class Batch:
    """What one pass computes: texts with equal sequences are one entry."""

    entries: list[list[Text]] = field(default_factory=list)
    num_tokens: int = 0
    oldest_arrival: float = math.inf

    @property
    def sequences(self) -> list[TokenSequence]:
        """One for each entry."""
        return [texts[0].sequence for texts in self.entries]

    @property
    def is_wanted(self) -> bool:
        """Whether somebody still waits for a part of it."""
        return any(not text.request.is_finished for texts in self.entries for text in texts)


@dataclass(frozen=True, slots=True, eq=False)
class Settled:
    """One answer to send."""

    request: Request
    outcome: Outcome


Answers: TypeAlias = list[Settled]
