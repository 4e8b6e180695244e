"""Every request's state from `submitted` to its one answer; knows no threads, no locks, no clock and no I/O.

Events come in as method calls with the time where time matters. What comes out are the answers to send. Its owner, the
batcher, holds one lock around it, so any interleaving of threads is a sequence of these calls.

    submitted -> tokenized (slice by slice) -> chosen -> computed
                 refused, cancelled, expired, failed or stopping may end a request at any moment

Each text is computed for its own request, with two exceptions. The cache may hold its vector when it is tokenized or
when its turn comes. And equal texts in one batch are computed once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from nv_embed.errors import Cancelled, ComputeFailed, InvalidRequest, OutOfDeviceMemory, RequestError, Unavailable
from nv_embed.requests import EmbedRequest
from nv_embed.scheduling.answers import Answer, Outcome, Reply
from nv_embed.scheduling.fair_queue import FairQueue, Flow
from nv_embed.scheduling.policy import BatchLimits, is_small, room, share
from nv_embed.scheduling.states import Answers, Batch, Request, Settled, Text
from nv_embed.scheduling.timers import Timers
from nv_embed.scheduling.vector_cache import Vector, VectorCache

_FIRST_QUESTION_SECONDS = 0.5  # a request that is answered sooner is never asked whether it is cancelled
_NOT_FINITE = "expected finite numbers from the network; got others for {text}; the server's log says more"
_MOST_KNOWN_TEXTS = 1024  # in one batch: they cost no computing, but each costs time under the lock


@dataclass(slots=True)
class Tally:
    """What the metrics count, since somebody last took it."""

    num_cached_texts: int = 0
    num_dropped_texts: int = 0


class Ledger:
    """All requests. Each event returns the answers that follow from it, each of them once."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._query_flow = Flow(limits.query_weight, kind="queries")
        self._queue: FairQueue[Text] = FairQueue(4 * limits.max_batch_tokens, lambda text: not text.request.is_finished)
        self._halves: deque[list[list[Text]]] = deque()  # of batches that did not fit on the device; they come first
        self.cache = VectorCache(limits.cache_bytes)
        self.requests: set[Request] = set()  # submitted and not finished
        self.num_queue_bytes = 0  # of texts that wait to be tokenized
        self.num_queue_tokens = 0  # of texts that wait to be computed
        self.num_texts = 0  # of `requests`
        self.tally = Tally()
        self._small_batches: set[Batch] = set()  # that are computed now
        self._timers = Timers()
        self._refuse_at = math.inf  # when what is unfinished is refused because the server is about to stop
        self._is_stopping = False

    @property
    def is_accepting(self) -> bool:
        """Whether a request that came now could be answered with vectors."""
        return not self._is_stopping and self._refuse_at == math.inf

    @property
    def has_work(self) -> bool:
        """Whether an engine that is idle should choose something."""
        if self._halves:
            return True
        waits_for_more = len(self._small_batches) >= self._limits.most_small_batches and is_small(self.num_queue_tokens)
        return not waits_for_more and self._queue.next_kind() is not None

    @property
    def has_short_work(self) -> bool:
        """The same without long texts."""
        return self._queue.next_kind(with_long=False) is not None

    # --- before computing -------------------------------------------------------------------------------

    def submitted(
        self, request: EmbedRequest, reply: Reply, now: float, num_unsent_texts: int = 0
    ) -> tuple[Request, Answers]:
        """A request came. Texts of answers that are not sent yet, `num_unsent_texts`, count too: they take memory."""
        flow = self._query_flow if request.is_query else Flow(weight=1)
        new = Request(request, reply, now, flow, next_question=now + _FIRST_QUESTION_SECONDS)
        self.requests.add(new)
        num_texts = self.num_texts + num_unsent_texts
        self.num_texts += len(request.texts)
        self.num_queue_bytes += request.num_bytes
        limits, num_bytes = self._limits, self.num_queue_bytes - request.num_bytes
        try:
            if self._is_stopping:
                raise _server_stops()
            self._check_room(new, limits.max_queue_bytes, num_bytes, request.num_bytes, "bytes of text")
            self._check_room(new, limits.max_queue_texts, num_texts, len(request.texts), "texts")
        except Unavailable as error:
            return new, self._finish(new, error)
        self._set_timer(new)
        return new, []

    def tokenized(self, request: Request, texts: Sequence[Text]) -> Answers:
        """The next texts of a request are tokenized. After the last all of them wait to be computed."""
        if request.is_finished:
            return []
        request.texts += texts
        request.num_tokens += sum(text.sequence.num_tokens for text in texts)
        request.num_new_tokens += sum(text.sequence.num_tokens for text in texts if text.key not in self.cache)
        most = self._limits.max_queue_tokens
        try:
            if request.num_tokens > most:
                raise InvalidRequest.of(
                    expected=f"at most {most} tokens a request, because no more may wait",
                    got=f"{request.num_tokens} or more",
                    remedy="split the request",
                )
            self._check_room(request, most, self.num_queue_tokens, request.num_new_tokens, "tokens")
            if len(request.texts) < len(request.spec.texts):
                return []
            return self._admit(request)
        except RequestError as error:
            return self._finish(request, error)

    def refused(self, request: Request, error: RequestError) -> Answers:
        """A request cannot be tokenized."""
        return self._finish(request, error)

    def _admit(self, request: Request) -> Answers:
        """Queue what the cache does not hold; raises Unavailable if there is no room for it."""
        for text in request.texts:
            text.vector = self.cache.get(text.key)
        missing = [text for text in request.texts if text.vector is None]
        num_tokens = sum(text.sequence.num_tokens for text in missing)
        self._check_room(request, self._limits.max_queue_tokens, self.num_queue_tokens, num_tokens, "tokens")
        self.num_queue_bytes -= request.spec.num_bytes
        self.tally.num_cached_texts += len(request.texts) - len(missing)
        request.is_tokenized, request.num_missing = True, len(missing)
        request.num_queue_tokens = num_tokens
        self.num_queue_tokens += num_tokens
        for text in missing:
            self._queue.push(text, request.flow, text.sequence.num_tokens)
        return self._answer_if_complete(request)

    @staticmethod
    def _check_room(request: Request, limit: int, waiting: int, more: int, what: str) -> None:
        limit = room(limit, is_query=request.spec.is_query)
        if more and waiting + more > limit:
            raise Unavailable(
                f"expected at most {limit} {what} to wait; got {waiting} waiting and {more} more; retry later"
            )

    # --- computing --------------------------------------------------------------------------------------

    def chosen(self, max_tokens: int, num_idle_engines: int, *, with_long: bool = True) -> tuple[Batch, Answers]:
        """An engine is about to be free: the next batch, empty if nothing that is wanted waits.

        Args:
            max_tokens: of the batch; a larger text comes alone.
            num_idle_engines: others that have nothing to do.
            with_long: False leaves out texts that take much longer than a batch.
        """
        batch, answers = Batch(), Answers()
        while self._halves and with_long and not batch.entries:
            half = self._halves.popleft()
            batch.entries = [texts for texts in map(_wanted, half) if texts]
            self.tally.num_dropped_texts += sum(map(len, half)) - sum(map(len, batch.entries))
        for texts in batch.entries:
            self._count_chosen(batch, texts[0])
        if batch.entries:
            return batch, answers
        max_tokens = min(max_tokens, share(self.num_queue_tokens, num_idle_engines))
        kind = self._queue.next_kind(with_long=with_long)
        entries: dict[bytes, list[Text]] = {}
        num_known = 0
        while kind and num_known < _MOST_KNOWN_TEXTS and (head := self._queue.peek(kind)):
            text, num_tokens = head
            known = self.cache.get(text.key)
            cost = 0 if known is not None or text.key in entries else num_tokens
            if entries and batch.num_tokens + cost > max_tokens:
                break
            self._queue.pop(kind, cost)
            self._leave_queue(text)
            if known is not None:
                num_known += 1
                answers += self._vector_found(text, known)
            elif cost:
                entries[text.key] = [text]
                self._count_chosen(batch, text)
            else:
                num_known += 1
                entries[text.key].append(text)
        self.tally.num_cached_texts += num_known
        batch.entries = list(entries.values())
        if batch.entries and is_small(batch.num_tokens):
            self._small_batches.add(batch)
        return batch, answers

    @staticmethod
    def _count_chosen(batch: Batch, text: Text) -> None:
        batch.num_tokens += text.sequence.num_tokens
        batch.oldest_arrival = min(batch.oldest_arrival, text.request.arrived)

    def _leave_queue(self, text: Text) -> None:
        text.request.is_started = True
        text.request.num_queue_tokens -= text.sequence.num_tokens
        self.num_queue_tokens -= text.sequence.num_tokens

    def computed(self, batch: Batch, vectors: Sequence[Vector | None]) -> Answers:
        """A batch is computed. `vectors`: one for each entry, kept as they are; None where it is not finite."""
        answers = Answers()
        self._small_batches.discard(batch)
        for texts, vector in zip(batch.entries, vectors, strict=True):
            if vector is None:
                answers += self._fail(texts, ComputeFailed, _NOT_FINITE)
                continue
            self.cache.put(texts[0].key, vector)
            for text in texts:
                answers += self._vector_found(text, vector)
        return answers

    def failed(self, batch: Batch, error: RequestError) -> Answers:
        """A batch could not be computed."""
        self._small_batches.discard(batch)
        requests = (text.request for texts in batch.entries for text in texts)
        return [answer for request in requests for answer in self._finish(request, error)]

    def did_not_fit(self, batch: Batch, reason: str) -> Answers:
        """A batch did not fit on the device: its halves are chosen next. A single text has nothing to halve."""
        self._small_batches.discard(batch)
        if len(batch.entries) > 1:
            middle = len(batch.entries) // 2
            self._halves.extendleft([batch.entries[middle:], batch.entries[:middle]])
            return []
        message = f"expected texts that fit on the device; got {{text}}: {reason}; shorten it"
        return self._fail(batch.entries[0], OutOfDeviceMemory, message)

    def given_up(self, batch: Batch) -> Answers:
        """A batch was given up while it was computed, because nobody waited for it any more."""
        self._small_batches.discard(batch)
        self.tally.num_dropped_texts += sum(map(len, batch.entries))
        return []

    def _vector_found(self, text: Text, vector: Vector) -> Answers:
        request = text.request
        if request.is_finished:
            return []
        assert text.vector is None
        text.vector = vector
        request.num_missing -= 1
        return self._answer_if_complete(request)

    def _answer_if_complete(self, request: Request) -> Answers:
        if request.num_missing:
            return []
        vectors = [text.vector for text in request.texts if text.vector is not None]
        token_counts = [text.sequence.num_tokens for text in request.texts]
        asks = request.spec.is_truncated
        is_truncated = [text.sequence.is_truncated for text in request.texts] if asks else None
        return self._finish(request, Answer(vectors, token_counts, is_truncated, request.spec.embedding_type))

    def _fail(self, texts: Sequence[Text], kind: type[RequestError], message: str) -> Answers:
        """End the requests of equal texts with an error. {text} in its message becomes 'text N'."""
        errors = ((text.request, kind(message.replace("{text}", f"text {text.index}"))) for text in texts)
        return [answer for request, error in errors for answer in self._finish(request, error)]

    # --- the end of a request ---------------------------------------------------------------------------

    def cancelled(self, request: Request) -> Answers:
        """Nobody waits for this request any more."""
        return self._finish(request, Cancelled("the request was cancelled before it was answered"))

    @property
    def next_timer(self) -> float:
        """When `expired` has something to do."""
        return self._timers.next_at

    def expired(self, now: float) -> tuple[Answers, list[Request]]:
        """Time has passed: answers to requests that waited too long, and requests to ask whether they are cancelled."""
        answers, questions = Answers(), []
        for request in self._timers.due(now):
            at, name = min(self._deadlines(request))
            if at <= now:
                waited = round(1000 * (now - request.arrived))
                error = Unavailable(f"expected an answer within {name}; got none in {waited} ms; retry later")
                answers += self._finish(request, error)
                continue
            if request.next_question <= now:
                questions.append(request)
                # More and more rarely, because a question costs a tenth of a short query.
                request.next_question = now + max(_FIRST_QUESTION_SECONDS, (now - request.arrived) / 4)
            self._set_timer(request)
        return answers, questions

    def stopping(self, refuse_at: float) -> None:
        """The server stops at this time: what is unfinished then, or comes later, is refused."""
        self._refuse_at = refuse_at
        for request in self.requests:
            self._set_timer(request)

    def stopped(self) -> Answers:
        """The end: every unfinished request is refused, and so is every later one."""
        self._is_stopping = True
        return [answer for request in list(self.requests) for answer in self._finish(request, _server_stops())]

    def _deadlines(self, request: Request) -> Iterator[tuple[float, str]]:
        if not request.is_started:
            yield request.arrived + self._limits.max_queue_seconds, "max_queue_milliseconds"
        if (seconds := request.spec.timeout_seconds) is not None:
            # The message names the length, because Triton counts microseconds and callers may mean milliseconds.
            yield request.arrived + seconds, f"the request's timeout of {1000 * seconds:g} ms"
        yield self._refuse_at, "the time the server has to stop"

    def _set_timer(self, request: Request) -> None:
        self._timers.set(request, min(request.next_question, *(at for at, _ in self._deadlines(request))))

    def _finish(self, request: Request, outcome: Outcome) -> Answers:
        """Settle a request's outcome; the first one stands."""
        if request.is_finished:
            return []
        request.is_finished = True
        self.requests.remove(request)
        self.num_texts -= len(request.spec.texts)
        self.num_queue_tokens -= request.num_queue_tokens
        if not request.is_tokenized:
            self.num_queue_bytes -= request.spec.num_bytes
        if not request.spec.is_query:
            self.tally.num_dropped_texts += len(request.flow.waiting)
            self._queue.forget(request.flow)
        elif request.num_queue_tokens:
            self.tally.num_dropped_texts += 1
        # A timer may keep the request for a while, so what is large goes now.
        request.texts, request.spec = [], replace(request.spec, texts=())
        return [Settled(request, outcome)]


def _wanted(texts: list[Text]) -> list[Text]:
    return [text for text in texts if not text.request.is_finished]


def _server_stops() -> Unavailable:
    return Unavailable("the server is stopping; retry with another one, or later")
