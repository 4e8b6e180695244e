"""What a computing thread does: passes of one engine, and between the pieces of a long one short batches of others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nv_embed.errors import ComputeFailed, DeviceLost, OutOfDeviceMemory
from nv_embed.metrics import Metric, Recorder
from nv_embed.scheduling.pace import Pace
from nv_embed.scheduling.policy import may_interrupt
from nv_embed.scheduling.shared_ledger import SharedLedger
from nv_embed.scheduling.states import Batch
from nv_embed.scheduling.vector_cache import Vector

logger = logging.getLogger(__name__)


class Computed(Protocol):
    """What an engine gives back."""

    @property
    def vectors(self) -> npt.NDArray[np.float32]:
        """[S, dim], rows of length 1."""

    @property
    def seconds(self) -> float:
        """That the device spent on them."""


class Engine(Protocol):
    """What computes."""

    def compute(self, next_batch: Callable[[], Sequence[Any] | None], pause: Callable[[], None]) -> Computed | None:
        """See `nv_embed.compute.engine.Engine.compute`."""


class _GivenUp(Exception):
    """Nobody waits for this batch any more."""


class Computing:
    """One thread's passes."""

    def __init__(
        self, engine: Engine, pace: Pace, ledger: SharedLedger, metrics: Recorder, announce: Callable[[], None]
    ) -> None:
        """`announce` is called after each batch, because something was counted."""
        self._engine, self._pace, self._ledger = engine, pace, ledger
        self._metrics, self._announce = metrics, announce

    def run(self) -> None:
        """Until the end; raises DeviceLost."""
        while self._compute(lambda: self._ledger.choose(lambda: self._pace.max_batch_tokens), may_be_long=True):
            pass

    def _compute(self, choose: Callable[[], Batch | None], *, may_be_long: bool) -> bool:
        """Compute the next batch; returns whether there was one."""
        batch, begun, others_seconds = Batch(), 0.0, 0.0

        def next_batch() -> Sequence[Any] | None:
            nonlocal batch, begun
            chosen, begun = choose(), time.monotonic()
            if chosen is None:
                return None
            batch = chosen
            self._metrics.observe(Metric.QUEUE_SECONDS, begun - batch.oldest_arrival)
            return batch.sequences

        def pause() -> None:
            nonlocal others_seconds
            if not batch.is_wanted:
                raise _GivenUp
            while may_be_long and may_interrupt(time.monotonic() - begun - others_seconds, others_seconds):
                started = time.monotonic()
                if not self._compute(self._choose_short, may_be_long=False):
                    return
                others_seconds += time.monotonic() - started

        ledger = self._ledger.ledger
        try:
            computed = self._engine.compute(next_batch, pause)
        except OutOfDeviceMemory as error:
            reason = str(error)
        except DeviceLost:
            raise  # no batch can succeed any more; this ends the thread, and with it the server
        except _GivenUp:
            self._ledger.tell(partial(ledger.given_up, batch))
            return True
        except Exception:
            logger.exception("computing a batch of %d texts failed", len(batch.entries))
            failure = ComputeFailed("computing this request failed; the server's log says why")
            self._ledger.tell(partial(ledger.failed, batch, failure))
            return True
        else:
            if computed is None:
                return False
            self._count(batch, computed.seconds)
            self._ledger.tell(partial(ledger.computed, batch, _rows(batch, computed.vectors)))
            self._announce()
            return True
        # Only here is the error gone, and with it the tensors of the failed batch that its stack kept alive.
        if len(batch.entries) > 1:
            logger.warning("%s; computing them in halves", reason)
            self._metrics.add(Metric.OUT_OF_MEMORY)
            self._pace.record_out_of_memory(batch.num_tokens)
        self._ledger.tell(partial(ledger.did_not_fit, batch, reason))
        return True

    def _choose_short(self) -> Batch | None:
        return self._ledger.choose_short(self._pace.max_batch_tokens)

    def _count(self, batch: Batch, seconds: float) -> None:
        self._pace.record(batch.num_tokens, seconds)
        self._metrics.observe(Metric.COMPUTE_SECONDS, seconds)
        self._metrics.observe(Metric.BATCH_TOKENS, batch.num_tokens)
        self._metrics.observe(Metric.BATCH_TEXTS, len(batch.entries))
        self._metrics.add(Metric.TOKENS, batch.num_tokens)
        self._metrics.add(Metric.TEXTS, len(batch.entries), source="computed")


def _rows(batch: Batch, vectors: npt.NDArray[np.float32]) -> list[Vector | None]:
    """A copy of each row, because a view would keep its whole batch in memory; None for one that is not finite."""
    is_finite = np.isfinite(vectors).all(axis=1)
    for sequence, is_good in zip(batch.sequences, is_finite, strict=True):
        if not is_good:
            logger.error(
                "the vector of a text of %d tokens is not finite; another dtype may hold it", sequence.num_tokens
            )
    return [vector.copy() if is_good else None for vector, is_good in zip(vectors, is_finite, strict=True)]
