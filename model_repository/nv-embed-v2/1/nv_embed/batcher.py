"""Requests in, batches to the engines, one answer for each request; knows neither torch nor Triton.

Threads, each with one duty: the caller's (`submit`), one that tokenizes, one for each engine that computes, one that
answers. A request's sequences may be spread over many batches; it is answered when the last is computed, or as a
whole by the first error. Waiting is bounded twice: in bytes until tokenized, in tokens from then on.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from nv_embed.errors import Cancelled, ComputeFailed, InvalidRequest, OutOfDeviceMemory, RequestError, Unavailable
from nv_embed.fair_queue import FairQueue, Flow
from nv_embed.requests import EmbedRequest
from nv_embed.tokenizer import TokenSequence

logger = logging.getLogger(__name__)

# A request is tokenized in slices of about this much, in turn with the others, so that none waits for a huge one.
_SLICE_BYTES = 256 * 1024

Embed: TypeAlias = Callable[[Sequence[TokenSequence]], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a request gets: one row for each of its N texts, in input order."""

    embeddings: npt.NDArray[np.float32]  # [N, embedding_dim], rows of length 1
    token_counts: npt.NDArray[np.int32]  # [N], as fed to the network


class Reply(Protocol):
    """The way back to one client. `send` is called exactly once; after it, nothing."""

    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""

    def send(self, outcome: Answer | RequestError) -> None:
        """Answer."""


class Encoder(Protocol):
    """The tokenizer, as far as it is needed here."""

    def encode(
        self, texts: Sequence[str], instruction: str, *, truncate: bool, first_index: int
    ) -> list[TokenSequence]:
        """Tokenize; raises InvalidRequest."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How much is computed at once and how much may wait."""

    max_batch_tokens: int
    max_queue_tokens: int
    max_queue_bytes: int
    query_weight: int


@dataclass(slots=True, eq=False)
class _Job:
    """A request on its way."""

    request: EmbedRequest
    reply: Reply
    flow: Flow
    sequences: list[TokenSequence] = field(default_factory=list)
    embeddings: npt.NDArray[np.float32] | None = None  # allocated with the first row, which knows the dimension
    num_missing: int = 0  # rows not computed yet
    num_tokens: int = 0  # of its sequences so far
    num_queue_tokens: int = 0  # its share of what waits to be computed
    is_finished: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """One sequence of a job: the unit of batching."""

    job: _Job
    index: int

    @property
    def sequence(self) -> TokenSequence:
        return self.job.sequences[self.index]


class Batcher:
    """Owns every request from `submit` until its answer."""

    def __init__(
        self, encoder: Encoder, engines: Sequence[Embed], limits: BatchLimits, on_fatal: Callable[[], None]
    ) -> None:
        """
        Args:
            encoder: the tokenizer.
            engines: one for each device; each is called from one thread of its own.
            limits: how much is computed at once and how much may wait.
            on_fatal: called once when a thread dies, after every request has been given an error.
        """
        self._encoder = encoder
        self._limits = limits
        self._on_fatal = on_fatal
        self._query_flow = Flow(limits.query_weight)
        self._changed = Condition()  # its lock guards everything below
        self._untokenized: deque[_Job] = deque()
        self._queue: FairQueue[_Row] = FairQueue()
        self._jobs: set[_Job] = set()  # submitted and not finished
        self._num_queue_bytes = 0
        self._num_queue_tokens = 0
        self._stopping = False
        self._answers: SimpleQueue[tuple[Reply, Answer | RequestError] | None] = SimpleQueue()
        self._workers = [self._start("tokenize", self._tokenize_loop)]
        self._workers += [
            self._start(f"compute-{i}", partial(self._compute_loop, embed)) for i, embed in enumerate(engines)
        ]
        self._answerer = self._start("answer", self._answer_loop)

    def submit(self, request: EmbedRequest, reply: Reply) -> None:
        """Take charge of a request; returns at once.

        Raises:
            Unavailable: too much waits, or the server stops. `reply` stays the caller's then.
        """
        limit = self._limits.max_queue_bytes
        with self._changed:
            if self._stopping:
                raise _stopping()
            if self._num_queue_bytes + request.num_bytes > limit:
                raise Unavailable(
                    f"expected at most {limit} bytes of text to wait for tokenization; got {self._num_queue_bytes} "
                    f"waiting and {request.num_bytes} more; retry later"
                )
            job = _Job(request, reply, self._query_flow if request.is_query else Flow(weight=1))
            self._jobs.add(job)
            self._untokenized.append(job)
            self._num_queue_bytes += request.num_bytes
            self._changed.notify_all()

    def stop(self) -> None:
        """Answer whatever is unfinished as unavailable and end the threads; returns when they have ended."""
        self._fail_all()
        for worker in self._workers:
            worker.join()
        self._answers.put(None)
        self._answerer.join()

    # --- tokenizing -------------------------------------------------------------------------------------

    def _tokenize_loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._untokenized or self._stopping)
                if self._stopping:
                    return
                job = self._untokenized.popleft()
            complete = self._tokenize_slice(job)
            with self._changed:
                if complete:
                    self._num_queue_bytes -= job.request.num_bytes
                    self._admit(job)
                else:
                    self._untokenized.append(job)

    def _tokenize_slice(self, job: _Job) -> bool:
        """Returns whether nothing is left to tokenize."""
        request, start = job.request, len(job.sequences)
        stop, num_characters = start, 0
        while stop < len(request.texts) and num_characters < _SLICE_BYTES:
            num_characters += len(request.instruction) + len(request.texts[stop])
            stop += 1
        try:
            if job.reply.is_cancelled():
                raise Cancelled("the request was cancelled while it waited for tokenization")
            sequences = self._encoder.encode(
                request.texts[start:stop], request.instruction, truncate=request.truncate, first_index=start
            )
            num_tokens = job.num_tokens + sum(sequence.num_tokens for sequence in sequences)
            if num_tokens > self._limits.max_queue_tokens:
                raise InvalidRequest.of(
                    expected=f"at most {self._limits.max_queue_tokens} tokens a request, for that is all that may wait",
                    got=f"{num_tokens} or more",
                    remedy="split the request",
                )
        except RequestError as error:
            self._finish(job, error)
        except Exception:
            logger.exception("tokenizing failed")
            self._finish(job, ComputeFailed("tokenizing this request failed; the server's log says why"))
        else:
            with self._changed:
                if not job.is_finished:
                    job.sequences += sequences
                    job.num_tokens = num_tokens
        return job.is_finished or stop == len(request.texts)

    def _admit(self, job: _Job) -> None:
        """Queue a tokenized job, all of it or nothing. The lock is held."""
        if job.is_finished:
            return
        if self._num_queue_tokens + job.num_tokens > self._limits.max_queue_tokens:
            message = (
                f"expected at most {self._limits.max_queue_tokens} tokens to wait; got {self._num_queue_tokens} "
                f"waiting and {job.num_tokens} more; retry later"
            )
            self._finish(job, Unavailable(message))
            return
        job.num_queue_tokens = job.num_tokens
        self._num_queue_tokens += job.num_tokens
        job.num_missing = len(job.sequences)
        for index, sequence in enumerate(job.sequences):
            self._queue.push(_Row(job, index), job.flow, sequence.num_tokens)
        self._changed.notify_all()

    # --- computing --------------------------------------------------------------------------------------

    def _compute_loop(self, embed: Embed) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopping)
                if self._stopping:
                    return
                rows = self._queue.take(self._limits.max_batch_tokens, lambda row: not row.job.is_finished)
                for row in rows:
                    row.job.num_queue_tokens -= row.sequence.num_tokens
                    self._num_queue_tokens -= row.sequence.num_tokens
            # Asked as late as can be, once for each request, for asking is not free.
            for job in {row.job: None for row in rows}:
                if job.reply.is_cancelled():
                    self._finish(job, Cancelled("the request was cancelled while it waited for the device"))
            self._compute(embed, [row for row in rows if not row.job.is_finished])

    def _compute(self, embed: Embed, rows: list[_Row]) -> None:
        if not rows:
            return
        try:
            embeddings = embed([row.sequence for row in rows])
        except OutOfDeviceMemory as error:
            if len(rows) == 1:
                self._finish(rows[0].job, OutOfDeviceMemory(f"text {rows[0].index}: {error}; shorten it"))
                return
            logger.warning("%s; retrying in halves", error)
            self._compute(embed, rows[: len(rows) // 2])
            self._compute(embed, [row for row in rows[len(rows) // 2 :] if not row.job.is_finished])
        except Exception:
            logger.exception("computing a batch of %d texts failed", len(rows))
            for job in {row.job: None for row in rows}:
                self._finish(job, ComputeFailed("computing this request failed; the server's log says why"))
        else:
            for row, embedding in zip(rows, embeddings, strict=True):
                self._deliver(row, embedding)

    def _deliver(self, row: _Row, embedding: npt.NDArray[np.float32]) -> None:
        job = row.job
        if not np.isfinite(embedding).all():
            self._finish(job, ComputeFailed(f"text {row.index}: the network's output is not finite"))
            return
        with self._changed:
            if job.is_finished:
                return
            if job.embeddings is None:
                job.embeddings = np.empty((len(job.sequences), len(embedding)), dtype=np.float32)
            job.embeddings[row.index] = embedding
            job.num_missing -= 1
            if job.num_missing == 0:
                counts = np.array([sequence.num_tokens for sequence in job.sequences], dtype=np.int32)
                self._finish(job, Answer(job.embeddings, counts))

    # --- answering --------------------------------------------------------------------------------------

    def _finish(self, job: _Job, outcome: Answer | RequestError) -> None:
        """Settle a job's outcome; the first one stands."""
        with self._changed:
            if job.is_finished:
                return
            job.is_finished = True
            self._jobs.remove(job)
            self._num_queue_tokens -= job.num_queue_tokens
            job.num_queue_tokens = 0
            self._answers.put((job.reply, outcome))

    def _answer_loop(self) -> None:
        while (answer := self._answers.get()) is not None:
            reply, outcome = answer
            try:
                reply.send(outcome)
            except Exception:  # the client cannot be told; the others must be
                logger.exception("sending an answer failed")

    # --- the end ----------------------------------------------------------------------------------------

    def _fail_all(self) -> None:
        with self._changed:
            self._stopping = True
            for job in list(self._jobs):
                self._finish(job, _stopping())
            self._changed.notify_all()

    def _start(self, name: str, loop: Callable[[], None]) -> Thread:
        thread = Thread(target=self._guard, args=(loop,), name=f"nv-embed-{name}", daemon=True)
        thread.start()
        return thread

    def _guard(self, loop: Callable[[], None]) -> None:
        """Run a thread's loop; should it ever break, leave nobody without an answer."""
        try:
            loop()
        except BaseException:
            logger.exception("a thread of the batcher died; answering every request and asking for a restart")
            self._fail_all()
            self._on_fatal()
            if loop == self._answer_loop:  # nobody else answers
                self._answer_loop()


def _stopping() -> Unavailable:
    return Unavailable("the server is stopping; retry with another one, or later")
