"""The threads that tokenize: one for queries and one for documents, so that no query waits for a slice of bulk."""

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


class Tokenizer(Protocol):
    """The model's tokenizer, as far as it is needed here."""

    def encode(
        self, texts: Sequence[str], instruction: str, *, truncate: bool, first_index: int
    ) -> Sequence[TokenSequence]:
        """Tokenize; raises InvalidRequest."""


class Tokenizing:
    """What one such thread does."""

    def __init__(self, tokenizer: Tokenizer, ledger: SharedLedger, metrics: Recorder) -> None:
        self._tokenizer, self._ledger, self._metrics = tokenizer, ledger, metrics
        self._waiting: SimpleQueue[Request | None] = SimpleQueue()

    def add(self, request: Request | None) -> None:
        """Have a request tokenized; None ends the thread."""
        self._waiting.put(request)

    def run(self) -> None:
        """Until the end."""
        while (request := self._waiting.get()) is not None:
            started = time.monotonic()
            self._tokenize_slice(request)
            self._metrics.add(Metric.TOKENIZE_SECONDS, time.monotonic() - started)
            if not (request.is_finished or request.is_tokenized):
                self._waiting.put(request)

    def _tokenize_slice(self, request: Request) -> None:
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
