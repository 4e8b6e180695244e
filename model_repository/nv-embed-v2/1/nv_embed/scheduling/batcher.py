"""Requests in, batches to the engines, one answer for each request; knows neither torch nor Triton.

Threads, each with one duty: the caller's (`submit`), one that tokenizes queries and one that tokenizes documents,
those that compute, and the one of `answers.py`, which sends. A request's texts may be spread over many batches; it is
answered when the last is computed, or as a whole by the first error. Waiting is bounded four times: in bytes until
tokenized, in tokens from then on, in texts until answered, and in time.
"""

from __future__ import annotations

import heapq
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from threading import Condition, RLock, Thread
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from nv_embed.errors import (
    Cancelled,
    ComputeFailed,
    DeviceLost,
    InvalidRequest,
    OutOfDeviceMemory,
    RequestError,
    Unavailable,
)
from nv_embed.metrics import Metric, Recorder, Update
from nv_embed.requests import EmbedRequest
from nv_embed.scheduling.answers import Answer, Outbox, Outcome, Reply
from nv_embed.scheduling.fair_queue import FairQueue, Flow
from nv_embed.scheduling.pace import MIN_BATCH_TOKENS, Pace
from nv_embed.scheduling.vector_cache import VectorCache
from nv_embed.sequence import TokenSequence

logger = logging.getLogger(__name__)

# Documents are tokenized in slices of about this much, one request in turn with the others, so that none waits for a
# huge one.
_SLICE_CHARACTERS = 64 * 1024
_WORTH_ASKING_CHARACTERS = 4096
_LAST_BATCH_SECONDS = 3.0
_STOP = "the time the server has to stop"
_QUERY_RESERVE = 8  # what may wait is an eighth more for queries: bulk that fills the queue does not shut them out

Vector: TypeAlias = npt.NDArray[np.float32]  # [dim]
# Waits for a batch that was started; returns its vectors, a row for each sequence, and the seconds it took.
Finish: TypeAlias = Callable[[], tuple[npt.NDArray[np.float32], float]]


class Encoder(Protocol):
    """The tokenizer, as far as it is needed here."""

    def encode(
        self, texts: Sequence[str], instruction: str, *, truncate: bool, first_index: int
    ) -> list[TokenSequence]:
        """Tokenize; raises InvalidRequest."""


class Engine(Protocol):
    """What computes."""

    @property
    def turn(self) -> AbstractContextManager[object]:
        """To be held while a batch is chosen and started; given when the device is about to be free."""

    def start(self, sequences: Sequence[TokenSequence]) -> Finish:
        """Begin a batch; raises OutOfDeviceMemory or, then or when it is waited for, DeviceLost."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How much is computed at once, and how much may wait and for how long."""

    max_batch_tokens: int
    target_batch_seconds: float | None  # fewer tokens when a batch takes longer than this; None: never
    max_queue_tokens: int
    max_queue_bytes: int
    max_queue_texts: int
    max_queue_seconds: float
    query_weight: int
    cache_bytes: int


@dataclass(slots=True, eq=False)
class _Job:
    """A request on its way."""

    request: EmbedRequest
    reply: Reply
    flow: Flow
    arrived: float
    computations: list[_Computation] = field(default_factory=list)  # one for each text
    num_tokens: int = 0
    num_new_tokens: int = 0  # of texts that the cache did not hold when they were tokenized
    embeddings: npt.NDArray[np.float32] | None = None  # allocated with the first row, which knows the dimension
    num_missing: int = 0  # rows not there yet
    num_queue_tokens: int = 0  # its share of what waits to be computed
    is_started: bool = False
    is_finished: bool = False


@dataclass(slots=True, eq=False)
class _Computation:
    """One sequence to compute, for every text, of whatever job, that has the same tokens."""

    sequence: TokenSequence
    key: bytes
    rows: list[tuple[_Job, int]] = field(default_factory=list)
    is_waiting: bool = True

    @property
    def is_wanted(self) -> bool:
        return any(not job.is_finished for job, _ in reversed(self.rows))  # the last to come are the last to time out


@dataclass(slots=True, eq=False)
class _Intake:
    """Where requests of one kind wait to be tokenized."""

    arrived: Condition  # there is something to tokenize, or to stop for
    jobs: deque[_Job] = field(default_factory=deque)


class Batcher:
    """Owns every request from `submit` until its answer."""

    def __init__(
        self,
        encoder: Encoder,
        engines: Sequence[Engine],
        limits: BatchLimits,
        *,
        on_fatal: Callable[[], None],
        publish: Callable[[Update], None],
    ) -> None:
        """
        Args:
            encoder: the tokenizer.
            engines: what computes, each entry for a thread of its own; one engine may have several.
            limits: how much is computed at once and how much may wait.
            on_fatal: called when a thread dies or an answer is lost, after every other request was given an error.
            publish: takes an update of a metric, from the thread that answers.
        """
        self._encoder = encoder
        self._limits = limits
        self._on_fatal = on_fatal
        self._metrics = Recorder()
        self._query_flow = Flow(limits.query_weight, kind="queries")
        self._lock = RLock()  # guards everything below; a number alone may be read without it
        self._queued = Condition(self._lock)  # there is something to compute, or to stop for
        # Each with a thread of its own: neither waits for the other, a query least of all for a slice of bulk.
        self._queries, self._documents = (_Intake(Condition(self._lock)) for _ in range(2))
        self._queue: FairQueue[_Computation] = FairQueue()
        self._in_flight: dict[bytes, _Computation] = {}  # waiting or being computed
        self._cache = VectorCache(limits.cache_bytes)
        self._jobs: set[_Job] = set()  # submitted and not finished
        self._deadlines: list[tuple[float, int, _Job, str]] = []
        self._deadline_numbers = count()
        self._num_queue_bytes = 0
        self._num_queue_tokens = 0
        self._num_texts = 0  # of `_jobs`
        self._num_idle = 0  # engines that wait for work
        self._refuse_at = math.inf  # when what is unfinished is refused, once the server is about to stop
        self._is_stopping = False
        self._outbox = Outbox(self._metrics, collect=self._collect_metrics, publish=publish, on_lost=self._give_up)
        self._workers = [
            self._start("tokenize-queries", partial(self._tokenize_loop, self._queries)),
            self._start("tokenize-documents", partial(self._tokenize_loop, self._documents)),
        ]
        self._workers += [
            self._start(f"compute-{i}", partial(self._compute_loop, engine)) for i, engine in enumerate(engines)
        ]

    def submit(self, request: EmbedRequest, reply: Reply) -> None:
        """Take charge of a request; returns at once, raises nothing."""
        job = _Job(request, reply, self._query_flow if request.is_query else Flow(weight=1), time.monotonic())
        limits = self._limits
        with self._lock:
            num_texts_before = self._num_texts + self._outbox.num_unsent_rows
            self._jobs.add(job)
            self._num_texts += len(request.texts)
            try:
                if self._is_stopping:
                    raise _server_stops()
                self._check_room(job, limits.max_queue_bytes, self._num_queue_bytes, request.num_bytes, "bytes of text")
                self._check_room(job, limits.max_queue_texts, num_texts_before, len(request.texts), "texts")
            except Unavailable as error:
                self._finish(job, error)
            else:
                intake = self._queries if request.is_query else self._documents
                intake.jobs.append(job)
                self._num_queue_bytes += request.num_bytes
                self._add_deadline(job, job.arrived + limits.max_queue_seconds, "max_queue_milliseconds")
                if request.timeout_seconds is not None:
                    # With its length: Triton counts microseconds, which is easily taken for milliseconds.
                    name = f"the request's timeout of {1000 * request.timeout_seconds:g} ms"
                    self._add_deadline(job, job.arrived + request.timeout_seconds, name)
                if self._refuse_at < math.inf:
                    self._add_deadline(job, self._refuse_at, _STOP)
                intake.arrived.notify()

    @property
    def is_accepting(self) -> bool:
        """Whether a request that came now could be answered with vectors."""
        return not self._is_stopping and self._refuse_at == math.inf

    def refuse(self, reply: Reply, error: RequestError) -> None:
        """Answer, and count, a request that could not be understood."""
        self._outbox.put(reply, error, "unknown")

    def drain(self, seconds: float) -> int:
        """Answer what is unfinished after `seconds`, or comes later, as unavailable: the server is about to stop.

        Returns:
            how many requests have no answer yet, settled ones included that are still to be sent.
        """
        with self._lock:
            self._refuse_at = time.monotonic() + seconds
            for job in self._jobs:
                self._add_deadline(job, self._refuse_at, _STOP)
            self._documents.arrived.notify()  # who tokenizes looks after the deadlines, too
            return len(self._jobs) + self._outbox.num_unsent

    def stop(self) -> None:
        """Answer whatever is unfinished as unavailable, and return when that is sent.

        A batch that is being computed, for nobody any more, is waited for at most 3 s.
        """
        self._fail_all()
        until = time.monotonic() + _LAST_BATCH_SECONDS
        for worker in self._workers:
            worker.join(max(until - time.monotonic(), 0.0))
        self._outbox.close()

    # --- tokenizing -------------------------------------------------------------------------------------

    def _tokenize_loop(self, intake: _Intake) -> None:
        while True:
            with self._lock:
                while not (intake.jobs or self._is_stopping):
                    intake.arrived.wait(self._expire())
                if self._is_stopping:
                    return
                self._expire()
                job = intake.jobs.popleft()
            if self._tokenize_slice(job):
                self._admit(job)
            else:
                with self._lock:
                    intake.jobs.append(job)

    def _tokenize_slice(self, job: _Job) -> bool:
        """Returns whether nothing is left to tokenize."""
        # Looked at before it is asked whether the job is finished: finishing it, at any moment, takes its texts away.
        request, start = job.request, len(job.computations)
        if job.is_finished:
            return True
        started, stop, num_characters = time.monotonic(), start, 0
        while stop < len(request.texts) and num_characters < _SLICE_CHARACTERS:
            num_characters += len(request.instruction) + len(request.texts[stop])
            stop += 1
        try:
            # Asking costs more than tokenizing a little: then it is asked once, before it is computed.
            if num_characters > _WORTH_ASKING_CHARACTERS and job.reply.is_cancelled():
                raise Cancelled("the request was cancelled while it waited to be tokenized")
            sequences = self._encoder.encode(
                request.texts[start:stop], request.instruction, truncate=request.truncate, first_index=start
            )
            self._add_slice(job, [_Computation(sequence, sequence.digest()) for sequence in sequences])
        except RequestError as error:
            self._finish(job, error)
        except Exception:
            logger.exception("tokenizing failed")
            self._finish(job, ComputeFailed("tokenizing this request failed; the server's log says why"))
        self._metrics.add(Metric.TOKENIZE_SECONDS, time.monotonic() - started)
        return job.is_finished or stop == len(request.texts)

    def _add_slice(self, job: _Job, computations: list[_Computation]) -> None:
        """Raises InvalidRequest or Unavailable for what cannot wait: it is no use to tokenize the rest of it."""
        with self._lock:
            if job.is_finished:
                return
            job.computations += computations
            job.num_tokens += sum(own.sequence.num_tokens for own in computations)
            job.num_new_tokens += sum(own.sequence.num_tokens for own in computations if own.key not in self._cache)
            if job.num_tokens > self._limits.max_queue_tokens:
                raise InvalidRequest.of(
                    expected=f"at most {self._limits.max_queue_tokens} tokens a request, for that is all that may wait",
                    got=f"{job.num_tokens} or more",
                    remedy="split the request",
                )
            self._check_room_for_tokens(job, job.num_new_tokens)

    def _admit(self, job: _Job) -> None:
        """Queue a tokenized job, all of it or nothing."""
        with self._lock:
            self._num_queue_bytes -= job.request.num_bytes
            known = self._queue_missing(job)
            rows = self._rows(job, known[0][1]) if known else None
        if rows is not None:
            # Without the lock, for a large request's take long. Nobody else writes these, and until they are counted
            # the job is not complete.
            for index, vector in known:
                rows[index] = vector
            with self._lock:
                self._count_filled(job, len(known))

    def _queue_missing(self, job: _Job) -> list[tuple[int, Vector]]:
        """Queue what is to be computed for a job; returns the rows that are known. The lock is held."""
        if job.is_finished:
            return []
        vectors = [self._cache.get(own.key) for own in job.computations]
        missing = [own for own, vector in zip(job.computations, vectors, strict=True) if vector is None]
        try:
            self._check_room_for_tokens(job, sum(own.sequence.num_tokens for own in missing))
        except Unavailable as error:
            self._finish(job, error)
            return []
        job.num_missing = len(job.computations)
        known = []
        for index, (own, vector) in enumerate(zip(list(job.computations), vectors, strict=True)):
            if vector is None:
                self._admit_text(job, index, own)
            else:
                known.append((index, vector))
        if known:
            self._metrics.add(Metric.TEXTS, len(known), source="cached")
        self._queued.notify()
        return known

    def _admit_text(self, job: _Job, index: int, own: _Computation) -> None:
        """Have a text computed, unless another job's computation of the same does. The lock is held."""
        computation = self._in_flight.setdefault(own.key, own)
        comes_again = bool(computation.rows) and computation.rows[-1][0] is job
        computation.rows.append((job, index))
        job.computations[index] = computation
        if computation is not own:
            self._metrics.add(Metric.TEXTS, source="coalesced")
        if not computation.is_waiting:
            job.is_started = True
            return
        self._count_waiting(job, computation.sequence.num_tokens)
        if not comes_again:  # queued also if others wait for it: this job may be ahead of them, or outlive them
            self._queue.push(computation, job.flow, computation.sequence.num_tokens)

    def _count_waiting(self, job: _Job, num_tokens: int) -> None:
        """The lock is held."""
        job.num_queue_tokens += num_tokens
        self._num_queue_tokens += num_tokens

    def _check_room_for_tokens(self, job: _Job, num_tokens: int) -> None:
        self._check_room(job, self._limits.max_queue_tokens, self._num_queue_tokens, num_tokens, "tokens")

    @staticmethod
    def _check_room(job: _Job, limit: int, waiting: int, more: int, what: str) -> None:
        """Raises Unavailable if so much more may not wait."""
        if job.request.is_query:
            limit += limit // _QUERY_RESERVE
        if more and waiting + more > limit:
            raise Unavailable(
                f"expected at most {limit} {what} to wait; got {waiting} waiting and {more} more; retry later"
            )

    # --- computing --------------------------------------------------------------------------------------

    def _compute_loop(self, engine: Engine) -> None:
        pace = Pace(self._limits.max_batch_tokens, self._limits.target_batch_seconds)
        while True:
            with ExitStack() as turn:
                turn.enter_context(engine.turn)
                batch = self._choose(pace)
                if batch is None:
                    return
                if batch:
                    self._compute(engine, batch, pace, turn)
                    self._outbox.announce()

    def _choose(self, pace: Pace) -> list[_Computation] | None:
        """Wait for work and return a batch, empty if nobody wants it any more; None when the end has come."""
        with self._lock:
            self._num_idle += 1
            self._queued.wait_for(lambda: self._queue or self._is_stopping)
            self._num_idle -= 1
            if self._is_stopping:
                return None
            self._expire()
            # What waits is shared out among the engines that have nothing to do.
            share = max(math.ceil(self._num_queue_tokens / (self._num_idle + 1)), MIN_BATCH_TOKENS)
            batch = self._take(min(pace.max_batch_tokens, share))
            if self._queue:
                self._queued.notify()  # one engine wakes the next, as long as there is something for it
        # Asked as late as can be, once for each request of the batch, for asking is not free.
        for job in {job: None for computation in batch for job, _ in computation.rows}:
            if not job.is_finished and job.reply.is_cancelled():
                self._finish(job, Cancelled("the request was cancelled while it waited to be computed"))
        with self._lock:
            for computation in batch:
                if not computation.is_wanted:
                    self._drop(computation)
            # Under the same lock: what is neither dropped nor computed would never be again.
            return [computation for computation in batch if computation.is_wanted]

    def _take(self, max_batch_tokens: int) -> list[_Computation]:
        """The next batch. The lock is held."""
        batch = self._queue.take(max_batch_tokens, lambda computation: computation.is_waiting and computation.is_wanted)
        now = time.monotonic()
        for computation in batch:
            computation.is_waiting = False
            for job, _ in computation.rows:
                job.is_started = True
                if not job.is_finished:
                    self._count_waiting(job, -computation.sequence.num_tokens)
        if batch:
            rows = (job for computation in batch for job, _ in computation.rows)
            oldest = min(job.arrived for job in rows if not job.is_finished)
            self._metrics.observe(Metric.QUEUE_SECONDS, now - oldest)
        return batch

    def _compute(self, engine: Engine, batch: list[_Computation], pace: Pace, turn: ExitStack) -> None:
        """Compute a batch; gives the turn back when it is started."""
        num_tokens = sum(computation.sequence.num_tokens for computation in batch)
        try:
            finish = engine.start([computation.sequence for computation in batch])
        except OutOfDeviceMemory as error:
            out_of_memory = str(error)
        except DeviceLost:
            raise  # no batch can succeed any more; ends this thread, and with it the server
        except Exception:
            self._fail_batch(batch)
            return
        else:
            turn.close()
            self._finish_batch(batch, num_tokens, finish, pace)
            return
        # Only here is the error gone, and with it the tensors of the failed batch that its stack kept alive.
        if len(batch) == 1:
            message = f"expected texts that fit on the device; got {{text}}: {out_of_memory}; shorten it"
            self._fail(batch[0], OutOfDeviceMemory, message)
            return
        self._metrics.add(Metric.OUT_OF_MEMORY)
        pace.record_out_of_memory(num_tokens)
        logger.warning("%s; computing them in halves", out_of_memory)
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            # Without giving the turn back: who has it next keeps it until there is work, and the halves would wait.
            self._compute(engine, half, pace, ExitStack())

    def _finish_batch(self, batch: list[_Computation], num_tokens: int, finish: Finish, pace: Pace) -> None:
        """Wait for a batch that was started, and deliver its vectors."""
        try:
            embeddings, seconds = finish()
        except DeviceLost:
            raise
        except Exception:
            self._fail_batch(batch)
            return
        pace.record(num_tokens, seconds)
        self._metrics.observe(Metric.COMPUTE_SECONDS, seconds)
        self._metrics.observe(Metric.BATCH_TOKENS, num_tokens)
        self._metrics.observe(Metric.BATCH_TEXTS, len(batch))
        self._metrics.add(Metric.TOKENS, num_tokens)
        self._metrics.add(Metric.TEXTS, len(batch), source="computed")
        for computation, vector in zip(batch, embeddings, strict=True):
            self._deliver(computation, vector)

    def _fail_batch(self, batch: list[_Computation]) -> None:
        """To be called where the exception is handled."""
        logger.exception("computing a batch of %d texts failed", len(batch))
        for computation in batch:
            self._fail(computation, ComputeFailed, "computing this request failed; the server's log says why")

    def _deliver(self, computation: _Computation, vector: Vector) -> None:
        if not np.isfinite(vector).all():
            num_tokens = computation.sequence.num_tokens
            logger.error("the vector of a text of %d tokens is not finite; another dtype may hold it", num_tokens)
            message = "expected finite numbers from the network; got others for {text}; the server's log says more"
            self._fail(computation, ComputeFailed, message)
            return
        with self._lock:
            del self._in_flight[computation.key]
            self._cache.put(computation.key, vector)
            for job, index in computation.rows:
                self._fill(job, index, vector)
            computation.rows.clear()  # rows and jobs refer to each other

    def _fill(self, job: _Job, index: int, vector: Vector) -> None:
        """Give a job one of its rows. The lock is held."""
        if not job.is_finished:
            self._rows(job, vector)[index] = vector
            self._count_filled(job, 1)

    @staticmethod
    def _rows(job: _Job, vector: Vector) -> npt.NDArray[np.float32]:
        """Where a job's rows go, each like the given one. The lock is held."""
        if job.embeddings is None:
            job.embeddings = np.empty((len(job.computations), len(vector)), dtype=np.float32)
        return job.embeddings

    def _count_filled(self, job: _Job, num_rows: int) -> None:
        """The lock is held."""
        job.num_missing -= num_rows
        if job.num_missing == 0 and not job.is_finished:
            assert job.embeddings is not None
            counts = np.array([own.sequence.num_tokens for own in job.computations], dtype=np.int32)
            self._finish(job, Answer(job.embeddings, counts))

    def _fail(self, computation: _Computation, kind: type[RequestError], message: str) -> None:
        """Answer all who wait for a text with an error, which may call it {text}."""
        with self._lock:
            del self._in_flight[computation.key]
            for job, index in computation.rows:
                self._finish(job, kind(message.replace("{text}", f"text {index}")))
            computation.rows.clear()

    def _drop(self, computation: _Computation) -> None:
        """Forget a computation that nobody wants any more. The lock is held."""
        computation.is_waiting = False
        computation.rows.clear()
        del self._in_flight[computation.key]
        self._metrics.add(Metric.DROPPED_TEXTS)

    def _finish(self, job: _Job, outcome: Outcome) -> None:
        """Settle a job's outcome; the first one stands."""
        with self._lock:
            if job.is_finished:
                return
            job.is_finished = True
            self._jobs.remove(job)
            self._num_texts -= len(job.request.texts)
            self._num_queue_tokens -= job.num_queue_tokens
            if isinstance(outcome, RequestError):
                if not job.request.is_query:
                    self._queue.forget(job.flow)
                for computation in dict.fromkeys(job.computations):  # distinct, for one text may come many times
                    if computation.is_waiting and computation.rows and not computation.is_wanted:
                        self._drop(computation)
            kind = "query" if job.request.is_query else "documents"
            self._metrics.add(Metric.REQUEST_SECONDS, time.monotonic() - job.arrived, kind=kind)
            self._outbox.put(job.reply, outcome, kind)
            # A deadline may keep the job itself for a while; what is large goes now.
            job.computations, job.embeddings, job.request = [], None, replace(job.request, texts=())

    # --- deadlines --------------------------------------------------------------------------------------

    def _add_deadline(self, job: _Job, at: float, name: str) -> None:
        if len(self._deadlines) > 1000 + 4 * len(self._jobs):  # far deadlines of jobs long finished
            self._deadlines = [deadline for deadline in self._deadlines if not deadline[2].is_finished]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (at, next(self._deadline_numbers), job, name))

    def _expire(self) -> float | None:
        """Answer jobs whose time is over; returns the seconds until the next one's, if any. The lock is held."""
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, job, name = heapq.heappop(self._deadlines)
            if name == "max_queue_milliseconds" and job.is_started:
                continue
            waited = round(1000 * (now - job.arrived))
            self._finish(job, Unavailable(f"expected an answer within {name}; got none in {waited} ms; retry later"))
        return min(self._deadlines[0][0] - now, 3600.0) if self._deadlines else None  # waiting has a limit of its own

    # --- metrics and the end ----------------------------------------------------------------------------

    def _collect_metrics(self) -> list[Update]:
        self._metrics.set(Metric.QUEUE_TOKENS, self._num_queue_tokens)
        self._metrics.set(Metric.QUEUE_BYTES, self._num_queue_bytes)
        self._metrics.set(Metric.CACHE_BYTES, self._cache.num_bytes)
        return self._metrics.take()

    def _fail_all(self) -> None:
        with self._lock:
            self._is_stopping = True
            for job in list(self._jobs):
                self._finish(job, _server_stops())
            for intake in (self._queries, self._documents):
                intake.arrived.notify_all()
            self._queued.notify_all()

    def _give_up(self) -> None:
        self._fail_all()
        self._on_fatal()

    def _start(self, name: str, loop: Callable[[], None]) -> Thread:
        thread = Thread(target=self._guard, args=(loop,), name=f"nv-embed-{name}", daemon=True)
        thread.start()
        return thread

    def _guard(self, loop: Callable[[], None]) -> None:
        """Run a thread's loop; should it ever break, leave nobody without an answer."""
        try:
            loop()
        except BaseException:
            logger.exception("a thread of the batcher died; every request gets an error and the server must restart")
            self._give_up()


def _server_stops() -> Unavailable:
    return Unavailable("the server is stopping; retry with another one, or later")
