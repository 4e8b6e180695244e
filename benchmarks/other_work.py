"""How much of the processors' time others had while something was measured: a run beside other work is no measurement.

The kernel says how long each of this machine's processors was busy: with processes, with interrupts, and with other
guests of the same host ("steal"). Only those count on which the own processes may run. What the own processes used is
taken off; the rest is others'. A server's process may end meanwhile: its time is then its parent's, who waited for it.
What another machine does is not seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from processes import PROC, TICK_SECONDS, Process, all_processes, families


@dataclass(frozen=True, slots=True)
class Times:
    """What processors did, in seconds."""

    busy: float
    steal: float  # part of busy
    total: float  # with what was idle

    def __add__(self, other: Times) -> Times:
        return Times(self.busy + other.busy, self.steal + other.steal, self.total + other.total)

    def __sub__(self, other: Times) -> Times:
        return Times(self.busy - other.busy, self.steal - other.steal, self.total - other.total)


@dataclass(frozen=True, slots=True)
class Moment:
    """What was done until then."""

    processes: dict[int, Process]
    processors: dict[int, Times]


@dataclass(frozen=True, slots=True)
class OtherWork:
    """Of others, between two moments."""

    share: float  # of the time of the processors on which the own processes may run
    by: str  # who had most of it

    def __str__(self) -> str:
        return f"others used {100 * self.share:.0f} % of the processors, most of it {self.by}"


def moment(proc: Path = PROC) -> Moment:
    """Now."""
    processors = {}
    for line in (proc / "stat").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(" ")
        if name.startswith("cpu") and name != "cpu":  # the sum of all
            # Guests of this machine, the fields after these, are in the times of user and nice.
            fields = [int(ticks) * TICK_SECONDS for ticks in rest.split()[:8]]
            user, nice, system, _idle, _waiting, irq, softirq, steal = fields
            busy = user + nice + system + irq + softirq + steal
            processors[int(name.removeprefix("cpu"))] = Times(busy, steal, sum(fields))
    return Moment(all_processes(proc), processors)


def processors_of(pids: Iterable[int]) -> set[int]:
    """Numbers of the processors on which any of these processes may run."""
    found = set()
    for pid in pids:
        with suppress(ProcessLookupError):  # it has just ended
            found |= os.sched_getaffinity(pid)
    return found


def other_work(before: Moment, after: Moment, roots: Iterable[int]) -> OtherWork:
    """What was neither idle time nor that of the roots and all that they started.

    Args:
        before: where it begins.
        after: where it ends.
        roots: pids of the own processes; their children are found. This process may be among them or not: the
            processors on which it may run count.
    """
    roots = list(roots)
    own = [family_seconds(then, roots) for then in (before, after)]
    spent = Times(0.0, 0.0, 0.0)
    for number in processors_of([os.getpid(), *roots]) & before.processors.keys() & after.processors.keys():
        spent += after.processors[number] - before.processors[number]
    others = min(max(spent.busy - (own[1] - own[0]), 0.0), spent.busy)
    share = others / spent.total if spent.total > 0 else 0.0
    strangers = after.processes.keys() - families(roots, after.processes)
    used = {f"{after.processes[pid].name} (pid {pid})": seconds_between(before, after, [pid]) for pid in strangers}
    used["other guests of this machine's host"] = spent.steal
    return OtherWork(share, max(used, key=lambda name: used[name]))


def family_seconds(then: Moment, roots: Iterable[int]) -> float:
    """What the roots and all that they started had used, those included that have ended."""
    family = [then.processes[pid] for pid in families(roots, then.processes)]
    return sum(process.seconds + process.reaped_seconds for process in family)


def seconds_between(before: Moment, after: Moment, pids: Iterable[int]) -> float:
    """What these processes used, without their children."""
    return sum(
        after.processes[pid].seconds - (before.processes[pid].seconds if pid in before.processes else 0.0)
        for pid in pids
        if pid in after.processes
    )
