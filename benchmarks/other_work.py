"""How much of the processors' time others had while something was measured: a run beside other work is no measurement.

The kernel says how long this machine's processors were busy: with processes, with interrupts, and with other guests of
the same host ("steal"). What the own processes used is taken off; the rest is others'. A server's process may end
meanwhile: its time is then its parent's, who waited for it. What another machine does is not seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from processes import PROC, TICK_SECONDS, Process, all_processes, families


@dataclass(frozen=True, slots=True)
class Moment:
    """What the processors had done until then, in seconds of all of them together."""

    processes: dict[int, Process]
    busy: float
    steal: float  # part of busy
    total: float  # with what was idle


@dataclass(frozen=True, slots=True)
class OtherWork:
    """Of others, between two moments."""

    share: float  # of all processors' time
    by: str  # who had most of it

    def __str__(self) -> str:
        return f"others used {100 * self.share:.0f} % of the processors, most of it {self.by}"


def moment(proc: Path = PROC) -> Moment:
    """Now."""
    with (proc / "stat").open(encoding="ascii") as file:
        # Guests of this machine, the fields after these, are in the times of user and nice.
        fields = [int(ticks) * TICK_SECONDS for ticks in file.readline().split()[1:9]]
    user, nice, system, _idle, _waiting, irq, softirq, steal = fields
    return Moment(all_processes(proc), user + nice + system + irq + softirq + steal, steal, sum(fields))


def other_work(before: Moment, after: Moment, roots: Iterable[int]) -> OtherWork:
    """What was neither idle time nor that of the roots and all that they started.

    Args:
        before: where it begins.
        after: where it ends.
        roots: pids of the own processes; their children are found.
    """
    roots = list(roots)
    own = [family_seconds(then, roots) for then in (before, after)]
    busy = after.busy - before.busy
    others = min(max(busy - (own[1] - own[0]), 0.0), busy)
    share = others / (after.total - before.total) if after.total > before.total else 0.0
    strangers = after.processes.keys() - families(roots, after.processes)
    used = {f"{after.processes[pid].name} (pid {pid})": seconds_between(before, after, [pid]) for pid in strangers}
    used["other guests of this machine's host"] = after.steal - before.steal
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
