"""This machine's processes: who serves, what they hold, what they used. Only looks: kills none, sends no request."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROC = Path("/proc")
KINDS = {"tritonserver": "server", "triton_python_b": "worker"}  # by the names that the kernel has, of 15 characters
GATEWAY = "nv-embed-gatewa"
TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
LISTENS = "0A"  # a state of a connection, as the kernel writes it
MIN_MEMORY_SAMPLES = 60  # one a second; the first quarter is warm-up, and a shorter one would not be over


@dataclass(frozen=True, slots=True)
class Usage:
    """Memory at one moment, in bytes."""

    at: float
    pid: int  # of the server: another one is another life
    server: int
    worker: int
    shm: int  # of /dev/shm that both share
    regions: frozenset[Path]  # the files there


@dataclass(frozen=True, slots=True)
class Process:
    """What a process was at one moment."""

    parent: int
    name: str
    seconds: float  # of processor time, those of its ended threads too
    reaped_seconds: float  # of its children that have ended and that it waited for


def all_processes(proc: Path = PROC) -> dict[int, Process]:
    """By their pids."""
    found = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            try:
                text, rest = (entry / "stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)
            except OSError:  # it has just ended
                continue
            fields = rest.split()
            user, system, reaped_user, reaped_system = (int(ticks) * TICK_SECONDS for ticks in fields[11:15])
            name = text.partition("(")[2]
            found[int(entry.name)] = Process(int(fields[1]), name, user + system, reaped_user + reaped_system)
    return found


def families(roots: Iterable[int], processes: Mapping[int, Process]) -> set[int]:
    """Those of the roots that run, and all that descend from them."""
    found = set(roots) & processes.keys()
    while more := {pid for pid, process in processes.items() if process.parent in found} - found:
        found |= more
    return found


def processes_of(root: int) -> dict[str, int]:
    """Pids of the tritonserver and of the model's process below serve.sh."""
    processes = all_processes()
    return {KINDS[processes[pid].name]: pid for pid in families([root], processes) if processes[pid].name in KINDS}


def processes_behind(url: str, processes: Mapping[int, Process], proc: Path = PROC) -> set[int]:
    """Pids of the server at an address, and of all that it started; none if the address is another machine's.

    Who listens is hidden where that is another user's process, or one in a container. Then these are all Triton
    servers of this machine. One that only forwards, such as ssh -L, is found, and so no server is taken for its own.

    Args:
        url: HOST:PORT, also with http:// before it.
        processes: those that run.
        proc: where the kernel describes them.
    """
    host, _, port = url.rpartition("//")[2].rpartition(":")
    if not port.isdigit() or not is_here(host.strip("/[]")):
        return set()
    listeners = _listeners(int(port), processes, proc)
    servers = {pid for pid, process in processes.items() if KINDS.get(process.name) == "server"}
    return families(listeners or servers, processes)


def is_here(host: str) -> bool:
    """Whether a name or an address is this machine's: only then can a port be opened there."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, _, _, address in addresses:
        with suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind(address)
            return True
    return False


def _listeners(port: int, processes: Iterable[int], proc: Path) -> set[int]:
    """Pids of those that listen on a port and that this user may look at."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:  # a kernel without IPv6
            continue
        for _, local, _, state, *rest in map(str.split, lines):
            if state == LISTENS and int(local.rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{rest[5]}]")
    found = set()
    for pid in processes:
        try:
            if any(os.readlink(descriptor) in sockets for descriptor in (proc / str(pid) / "fd").iterdir()):
                found.add(pid)
        except OSError:  # it has just ended, or is another user's
            continue
    return found


def memory_of(root: int) -> Usage | None:
    """Of the server below serve.sh; None while it is not complete."""
    pids = processes_of(root)
    try:
        sizes = [
            int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for pid in (pids["server"], pids["worker"])
        ]
        maps = Path(f"/proc/{pids['worker']}/maps").read_text(encoding="utf-8", errors="replace")
        regions = frozenset(Path("/dev/shm/" + part.split()[0]) for part in maps.split(" /dev/shm/")[1:])
        shm = sum(region.stat().st_blocks * 512 for region in regions)
    except (KeyError, OSError):
        return None
    return Usage(time.monotonic(), pids["server"], sizes[0], sizes[1], shm, regions)


def growth(usages: Sequence[Usage], since: float) -> dict[str, Any]:
    """Of the server's last life after `since`: medians of the second and of the last quarter of its samples."""
    if not usages:
        return {}
    life = [u for u in usages if u.pid == usages[-1].pid and u.at >= since]
    if len(life) < MIN_MEMORY_SAMPLES:
        return {"samples": len(life)}
    quarter = len(life) // 4
    early, late = life[quarter : 2 * quarter], life[-quarter:]
    result: dict[str, Any] = {"samples": len(life), "seconds": round(life[-1].at - life[0].at)}
    for name in ("server", "worker", "shm"):
        before, after = (float(np.median([getattr(u, name) for u in part])) for part in (early, late))
        result[name] = {
            "before_mib": round(before / 2**20, 1),
            "after_mib": round(after / 2**20, 1),
            "growth": round(after / before - 1, 4) if before else 0.0,
        }
    return result
