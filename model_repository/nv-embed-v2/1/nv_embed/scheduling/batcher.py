"""Requests in, batches to the engines, one answer for each request: the threads around the ledger.

Each thread has one duty: the caller's submits and tokenizes what is short, two tokenize what is long, one for each
entry of `engines` computes, one watches the clock, and the one of `answers.py` sends. Knows neither torch nor Triton.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from threading import Thread

from nv_embed.errors import RequestError
from nv_embed.metrics import Metric, Recorder, Update
from nv_embed.requests import EmbedRequest
from nv_embed.scheduling.answers import Answer, Outbox, Reply
from nv_embed.scheduling.computing import Computing, Engine
from nv_embed.scheduling.pace import Pace
from nv_embed.scheduling.policy import BatchLimits
from nv_embed.scheduling.shared_ledger import SharedLedger
from nv_embed.scheduling.tokenizing import Tokenizer, Tokenizing

logger = logging.getLogger(__name__)

_LAST_BATCH_SECONDS = 3.0


class Batcher:
    """Owns every request from `submit` until its answer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        engines: Sequence[Engine],
        limits: BatchLimits,
        *,
        on_fatal: Callable[[], None],
        publish: Callable[[Update], None],
    ) -> None:
        """
        Args:
            tokenizer: of the model.
            engines: what computes, each entry for a thread of its own; one engine may have several.
            limits: how much is computed at once and how much may wait.
            on_fatal: called when a thread dies or an answer is lost, after every other request was given an error.
            publish: takes an update of a metric, from the thread that answers.
        """
        self._on_fatal = on_fatal
        self._metrics = Recorder()
        self._outbox = Outbox(self._metrics, collect=self._collect_metrics, publish=publish, on_lost=self._give_up)
        self._ledger = SharedLedger(limits, self._outbox)
        self._queries, self._documents = (Tokenizing(tokenizer, self._ledger, self._metrics) for _ in range(2))
        duties = {"tokenize-queries": self._queries.run, "tokenize-documents": self._documents.run}
        for number, engine in enumerate(engines):
            pace = Pace(limits.max_batch_tokens, limits.target_batch_seconds)
            computing = Computing(engine, pace, self._ledger, self._metrics, self._outbox.announce)
            duties[f"compute-{number}"] = computing.run
        duties["clock"] = self._watch_clock
        self._threads = [
            Thread(target=self._guard, args=(duty,), name=f"nv-embed-{name}", daemon=True)
            for name, duty in duties.items()
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, spec: EmbedRequest, reply: Reply) -> None:
        """Take charge of a request, and tokenize it if it is short; raises nothing."""
        request = self._ledger.submit(spec, reply)
        tokenizing = self._queries if spec.is_query else self._documents
        self._guard(partial(tokenizing.add, request))

    def answer_without_vectors(self, reply: Reply) -> None:
        """Answer, and count, a request that asks for no vectors: it neither waits nor is computed."""
        self._outbox.put(reply, Answer((), ()), "model_info")

    def refuse(self, reply: Reply, error: RequestError) -> None:
        """Answer, and count, a request that could not be understood."""
        self._outbox.put(reply, error, "unknown")

    @property
    def is_accepting(self) -> bool:
        """Whether a request that came now could be answered with vectors."""
        return self._ledger.ledger.is_accepting

    @property
    def num_queue_tokens(self) -> int:
        """Tokens that wait to be computed."""
        return self._ledger.ledger.num_queue_tokens

    @property
    def num_unanswered(self) -> int:
        """Requests without an answer, including those whose answer is not sent yet."""
        return len(self._ledger.ledger.requests) + self._outbox.num_unsent

    def drain(self, seconds: float) -> None:
        """Answer what is unfinished after `seconds`, or comes later, as unavailable: the server is about to stop."""
        self._ledger.stop_at(seconds)

    def stop(self) -> None:
        """Answer whatever is unfinished as unavailable, and return when that is sent.

        It waits at most 3 s for batches that are being computed. Their requests are answered by then.
        """
        self._end()
        until = time.monotonic() + _LAST_BATCH_SECONDS
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.0))
        self._outbox.close()

    def _watch_clock(self) -> None:
        """Answer what waited too long, and ask what has waited for a while whether it is cancelled.

        A question takes as long as some texts take to tokenize, so no other thread asks.
        """
        while (requests := self._ledger.questions()) is not None:
            for request in requests:
                if not request.is_finished and request.reply.is_cancelled():
                    self._ledger.tell(partial(self._ledger.ledger.cancelled, request))

    def _collect_metrics(self) -> list[Update]:
        tally = self._ledger.take_tally()
        for num_texts, metric, labels in (
            (tally.num_cached_texts, Metric.TEXTS, {"source": "cached"}),
            (tally.num_dropped_texts, Metric.DROPPED_TEXTS, {}),
        ):
            if num_texts:
                self._metrics.add(metric, num_texts, **labels)
        ledger = self._ledger.ledger
        self._metrics.set(Metric.QUEUE_TOKENS, ledger.num_queue_tokens)
        self._metrics.set(Metric.QUEUE_BYTES, ledger.num_queue_bytes)
        self._metrics.set(Metric.CACHE_BYTES, ledger.cache.num_bytes)
        return self._metrics.take()

    def _end(self) -> None:
        self._ledger.end()
        for tokenizing in (self._queries, self._documents):
            tokenizing.end()

    def _give_up(self) -> None:
        self._end()
        self._on_fatal()

    def _guard(self, duty: Callable[[], None]) -> None:
        """Do the duty of a thread, or a part of it. If that breaks, answer everybody."""
        try:
            duty()
        except BaseException:
            logger.exception("the batcher broke; every request gets an error and the server must restart")
            self._give_up()
