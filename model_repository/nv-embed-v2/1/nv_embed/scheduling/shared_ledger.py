"""The ledger for many threads: one lock around it, conditions to wait on, and its answers passed to the outbox."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from threading import Condition, Lock

from nv_embed.requests import EmbedRequest
from nv_embed.scheduling.answers import Outbox, Reply
from nv_embed.scheduling.ledger import Ledger, Tally
from nv_embed.scheduling.policy import BatchLimits
from nv_embed.scheduling.states import Answers, Batch, Request


class SharedLedger:
    """Each method holds the lock for one event of the ledger, and releases it while it waits."""

    def __init__(self, limits: BatchLimits, outbox: Outbox) -> None:
        self._outbox = outbox
        self._lock = Lock()
        self.ledger = Ledger(limits)  # only its numbers may be read without the lock
        self._work = Condition(self._lock)  # there is something to compute, or the end has come
        self._time = Condition(self._lock)  # something is due earlier than what `questions` waits for
        self._wakes_at = math.inf
        self._num_idle = 0  # engines that wait for work
        self._is_over = False

    def submit(self, spec: EmbedRequest, reply: Reply) -> Request:
        """Add a request, which may be finished already."""
        with self._lock:
            request, answers = self.ledger.submitted(spec, reply, time.monotonic(), self._outbox.num_unsent_texts)
            self._send(answers)
            self._wake_clock()
            return request

    def tell(self, event: Callable[[], Answers]) -> None:
        """Let something happen: `event` calls the ledger."""
        with self._lock:
            self._send(event())
            if self._num_idle and self.ledger.has_work:
                self._work.notify()

    def choose(self, max_tokens: Callable[[], int]) -> Batch | None:
        """Wait for work and return a batch of at most `max_tokens()` tokens; None when the end has come."""
        while True:
            with self._lock:  # given back after each look: a batch may hold known texts alone, and many may follow
                self._num_idle += 1
                self._work.wait_for(lambda: self._is_over or self.ledger.has_work)
                self._num_idle -= 1
                if self._is_over:
                    return None
                batch, answers = self.ledger.chosen(max_tokens(), self._num_idle)
                self._send(answers)
                if self._num_idle and self.ledger.has_work:
                    self._work.notify()  # one engine wakes the next, as long as there is something for it
            if batch.entries:
                return batch

    def choose_short(self, max_tokens: int) -> Batch | None:
        """A batch of texts that are not long; None if there is none now."""
        with self._lock:
            while not self._is_over and self.ledger.has_short_work:
                batch, answers = self.ledger.chosen(max_tokens, self._num_idle, with_long=False)
                self._send(answers)
                if batch.entries:
                    return batch
            return None

    def questions(self) -> list[Request] | None:
        """Wait until some requests should be asked whether they are cancelled. Meanwhile, refuse what waits too long.

        None when the end has come.
        """
        with self._lock:
            while not self._is_over:
                answers, questions = self.ledger.expired(now := time.monotonic())
                self._send(answers)
                if questions:
                    return questions
                self._wakes_at = self.ledger.next_timer
                self._time.wait(min(self._wakes_at - now, 3600.0) if self._wakes_at < math.inf else None)
            return None

    def stop_at(self, seconds: float) -> None:
        """Refuse what is still unfinished `seconds` from now."""
        with self._lock:
            self.ledger.stopping(time.monotonic() + seconds)
            self._wake_clock()

    def end(self) -> None:
        """Refuse every unfinished and every later request, and let all threads that wait here return."""
        with self._lock:
            self._is_over = True
            self._send(self.ledger.stopped())
            self._work.notify_all()
            self._time.notify_all()

    def take_tally(self) -> Tally:
        """What was counted since the last time."""
        with self._lock:
            tally, self.ledger.tally = self.ledger.tally, Tally()
            return tally

    def _send(self, answers: Answers) -> None:
        for answer in answers:
            request = answer.request
            self._outbox.put(request.reply, answer.outcome, request.kind, request.arrived)

    def _wake_clock(self) -> None:
        if self.ledger.next_timer < self._wakes_at:
            self._time.notify()
