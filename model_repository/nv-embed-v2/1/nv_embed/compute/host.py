"""Cores and memory that the process may have: the machine's, within the limits of its control groups (v1 or v2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def most_cores(root: Path = _ROOT) -> float:
    """Cores' worth of time that the process may take; infinite without a quota."""
    quotas = [math.inf]
    for group in _groups(root, "cpu"):
        version_1 = [_read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        for limit in ((_read(group / "cpu.max") or "").split(), version_1):
            match limit:
                case [str(quota), str(period)] if quota not in ("max", "-1"):  # which say that there is no limit
                    quotas.append(int(quota) / int(period))
    return min(quotas)


def free_memory(root: Path = _ROOT) -> int:
    """Bytes that the process may take without swapping: the kernel's estimate, and no more than a group's limit."""
    meminfo = dict(
        line.split(":", 1) for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines() if ":" in line
    )
    limits = [int(meminfo["MemAvailable"].split()[0]) * 1024]
    for group in _groups(root, "memory"):
        # Version 1 writes a huge number where there is no limit, version 2 "max". Above memory.high a group is slowed
        # down so much that it might as well be full.
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            if (limit := _read(group / name)) and limit != "max":
                limits.append(int(limit))
    return min(limits)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the process's groups that may limit something, and of the groups around them.

    A container may see itself as the root of all groups, or under a name that exists outside of it only.
    """
    base = root / "sys/fs/cgroup"
    for line in (_read(root / "proc/self/cgroup") or "0::/").splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if not controllers:
            mounts = [base, base / "unified"]
        elif controller in names:
            mounts = [base / controllers, base / controller]
        else:
            continue
        own = Path(path.lstrip("/"))
        for mount in mounts:
            yield from (mount / group for group in (own, *own.parents))


def _read(path: Path) -> str | None:
    """None where there is nothing to be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
