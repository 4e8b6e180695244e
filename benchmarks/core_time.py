"""Core-milliseconds that a request costs, by process: they drift less than rates do, and say who spends them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from processes import GATEWAY, all_processes, processes_behind

WHO = {"tritonserver": "tritonserver", "triton_python_b": "model", GATEWAY: "gateway"}  # by a process's name
Answer = TypeVar("Answer")


@dataclass(slots=True)
class CoreTime:
    """Of one load on one target, in one round or in all."""

    seconds: dict[str, float]  # by who used them, of all that are seen
    num_requests: int  # answered

    def add(self, other: CoreTime) -> None:
        """Take in another round."""
        for who, seconds in other.seconds.items():
            self.seconds[who] = self.seconds.get(who, 0.0) + seconds
        self.num_requests += other.num_requests

    def per_request(self) -> dict[str, float | None]:
        """Milliseconds; None of those that do not run on this machine, and of all if nothing was answered."""
        return {
            who: round(1000 * self.seconds[who] / self.num_requests, 3)
            if who in self.seconds and self.num_requests
            else None
            for who in (*WHO.values(), "client")
        }


@dataclass(slots=True)
class CoreClock:
    """Of this process, which is the client, and of what is behind addresses."""

    who: Mapping[int, str]  # by pid
    spent: dict[str, float] = field(default_factory=dict)  # seconds, during the last call

    @classmethod
    def of(cls, urls: Sequence[str]) -> CoreClock:
        """That of the processes that run now."""
        processes = all_processes()
        behind = set().union(*(processes_behind(url, processes) for url in urls))
        who = {pid: WHO[processes[pid].name] for pid in behind if processes[pid].name in WHO}
        return cls(who | {os.getpid(): "client"})

    def around(self, call: Callable[..., Answer], *arguments: object) -> Answer:
        """What the call returns; `spent` then says who used what meanwhile."""
        before = self._read()
        answer = call(*arguments)
        after = self._read()
        self.spent = {}
        for pid in before.keys() & after.keys():  # one that ended has no clock any more
            who = self.who[pid]
            self.spent[who] = self.spent.get(who, 0.0) + after[pid] - before[pid]
        return answer

    def _read(self) -> dict[int, float]:
        seconds = {}
        for pid in self.who:
            with suppress(OSError):
                # The clock of a process, all its threads together, as clock_getcpuclockid(3) names it on Linux. It has
                # nanoseconds; /proc has hundredths of a second, too few for what tritonserver uses.
                seconds[pid] = time.clock_gettime(~pid << 3 | 2)
        return seconds
