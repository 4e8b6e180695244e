"""Core-milliseconds that a request costs, by process: that drifts less than rates do, and says who spends it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from other_work import Moment, seconds_between
from processes import GATEWAY, processes_behind

WHO = {"tritonserver": "tritonserver", "triton_python_b": "model", GATEWAY: "gateway"}  # by a process's name


@dataclass(slots=True)
class CoreTime:
    """Of one load on one target, in one round or in all."""

    seconds: Counter[str] = field(default_factory=Counter)  # by who used them; others are on another machine
    num_requests: int = 0  # answered

    def add(self, other: CoreTime) -> None:
        """Take in another round."""
        self.seconds.update(other.seconds)  # which keeps zeros, as += does not
        self.num_requests += other.num_requests

    def per_request(self) -> dict[str, float | None]:
        """Milliseconds; None of those who are not there or not seen, and of all if nothing was answered."""
        return {
            who: round(1000 * self.seconds[who] / self.num_requests, 3)
            if who in self.seconds and self.num_requests
            else None
            for who in (*WHO.values(), "client")
        }


def core_time(before: Moment, after: Moment, urls: Sequence[str], num_requests: int) -> CoreTime:
    """Of what is behind these addresses, and of this process, which is the client."""
    found = CoreTime(num_requests=num_requests)
    found.seconds["client"] = seconds_between(before, after, [os.getpid()])
    for pid in set().union(*(processes_behind(url, before.processes) for url in urls)):
        if who := WHO.get(before.processes[pid].name):
            found.seconds[who] += seconds_between(before, after, [pid])
    return found
