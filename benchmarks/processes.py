"""The processes of a server started through serve.sh, and their memory. Only looks: kills none, sends no request."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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


def processes_of(root: int) -> dict[str, int]:
    """Pids of the tritonserver and of the model's process below serve.sh."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, rest = (entry / "stat").read_text().rsplit(")", 1)
            except OSError:  # it has just ended
                continue
            parents[int(entry.name)] = int(rest.split()[1])
            names[int(entry.name)] = name.partition("(")[2]
    found = {}
    for pid, name in names.items():
        kind = {"tritonserver": "server", "triton_python_b": "worker"}.get(name)
        ancestor = pid
        while kind and ancestor > 1 and ancestor != root:
            ancestor = parents.get(ancestor, 0)
        if kind and ancestor == root:
            found[kind] = pid
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
