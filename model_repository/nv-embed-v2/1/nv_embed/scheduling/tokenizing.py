"""Tokenizes requests. The thread that receives a short one does it, because handing it over would take longer.

Two threads tokenize what is long, one for queries and one for documents, so that no query waits for a slice of bulk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from nv_embed.errors import ComputeFailed, RequestError
from nv_embed.metrics import Metric, Recorder
from nv_embed.scheduling.shared_ledger import SharedLedger
from nv_embed.scheduling.states import Request, Text
from nv_embed.sequence import TokenSequence

logger = logging.getLogger(__name__)

# Requests take turns, with a slice of about this size each, so that none waits for a huge one.
_SLICE_CHARACTERS = 64 * 1024
_SHORT_BYTES, _SHORT_TEXTS = 4096, 16  # of a short request, which is a millisecond's work at most


class Tokenizer(Protocol):
    """The model's tokenizer, as far as it is needed here."""

    def encode(
        self, texts: Sequence[str], instruction: str, *, truncate: bool, first_index: int
    ) -> Sequence[TokenSequence]:
        """Tokenize; raises InvalidRequest."""


class Tokenizing:
    """What one such thread does, and what is done in its place."""

    def __init__(self, tokenizer: Tokenizer, ledger: SharedLedger, metrics: Recorder) -> None:
        self._tokenizer, self._ledger, self._metrics = tokenizer, ledger, metrics
        self._waiting: SimpleQueue[Request | None] = SimpleQueue()

    def add(self, request: Request) -> None:
        """Tokenize a short request now. Have a long one tokenized."""
        if request.spec.num_bytes <= _SHORT_BYTES and len(request.spec.texts) <= _SHORT_TEXTS:
            self._tokenize_slice(request)
        else:
            self._waiting.put(request)

    def end(self) -> None:
        """End the thread."""
        self._waiting.put(None)

    def run(self) -> None:
        """Until the end."""
        while (request := self._waiting.get()) is not None:
            self._tokenize_slice(request)
            if not (request.is_finished or request.is_tokenized):
                self._waiting.put(request)

    def _tokenize_slice(self, request: Request) -> None:
        started = time.monotonic()
        # Read before `is_finished`, because the ledger takes the texts away after it has set that.
        spec, start = request.spec, len(request.texts)
        if request.is_finished:
            return
        stop, num_characters = start, 0
        while stop < len(spec.texts) and num_characters < _SLICE_CHARACTERS:
            num_characters += len(spec.instruction) + len(spec.texts[stop])
            stop += 1
        ledger = self._ledger.ledger
        try:
            sequences = self._tokenizer.encode(
                spec.texts[start:stop], spec.instruction, truncate=spec.truncate, first_index=start
            )
            texts = [Text(request, i, sequence, sequence.digest()) for i, sequence in enumerate(sequences, start)]
            self._ledger.tell(partial(ledger.tokenized, request, texts))
        except RequestError as error:
            self._ledger.tell(partial(ledger.refused, request, error))
        except Exception:
            logger.exception("tokenizing failed")
            failure = ComputeFailed("tokenizing this request failed; the server's log says why")
            self._ledger.tell(partial(ledger.refused, request, failure))
        self._metrics.add(Metric.TOKENIZE_SECONDS, time.monotonic() - started)
