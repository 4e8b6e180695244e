"""The machine that the process runs on: its cores and memory, within the limits of its control groups (v1 or v2).

The models of one server load one after the other, each in a process of its own. So what an earlier one holds is no
longer free. What it will need besides, it tells the others by the name of a file in memory: no file is left behind,
and the note ends with the process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")
_RESERVED = "nv-embed-reserved-"
_FEW_PRODUCTS = "128"  # with 32 a query alone takes longer, and 1,024, the default of both, hold much memory
_BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}  # of Intel and AMD, the last of Arm


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


def keep_few_products() -> None:
    """Have torch and oneDNN keep what they prepared for few sizes of products. Call it before torch is imported.

    Each number of tokens in a batch is another size, and what is kept for it stays in the heap. So memory would grow
    with each new size. What the operator has set stays.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, _FEW_PRODUCTS)


def multiplies_bfloat16(root: Path = _ROOT) -> bool:
    """Whether the processor has instructions for it, so that a matrix product need not go through float32."""
    flags = {word for line in (_read(root / "proc/cpuinfo") or "").splitlines() for word in line.split()}
    return bool(flags & _BFLOAT16_FLAGS)


def free_memory(root: Path = _ROOT) -> int:
    """Bytes that the process may take without swapping: the kernel's estimate, or less if a group has less left."""
    meminfo = dict(
        line.split(":", 1) for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines() if ":" in line
    )
    free = [int(meminfo["MemAvailable"].split()[0]) * 1024]
    for group in _groups(root, "memory"):
        # Version 1 writes a huge number where there is no limit, version 2 "max". Above memory.high a group is slowed
        # down so much that it might as well be full.
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            if (limit := _read(group / name)) and limit != "max":
                free.append(max(int(limit) - _used(group), 0))
    return min(free)


def reserve_memory(num_bytes: int) -> None:
    """Tell other models of this server what this one will need beside what it holds by now, until its process ends."""
    os.memfd_create(f"{_RESERVED}{num_bytes}")  # never closed


def reserved_memory() -> int:
    """Bytes that the other models of this server have reserved."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):  # one that has ended, or is not this user's
            text = status.read_text(encoding="utf-8", errors="replace")
            if status.parent.name == str(os.getpid()) or f"\nPPid:\t{os.getppid()}\n" not in text:
                continue
            for descriptor in (status.parent / "fd").iterdir():
                note = os.readlink(descriptor).partition(_RESERVED)[2]
                total += int(note.split()[0]) if note else 0
    return total


def _used(group: Path) -> int:
    """Bytes that a group holds, without what the kernel keeps of files and can drop."""
    used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes") or "0"
    lines = (_read(group / "memory.stat") or "").splitlines()
    # Version 1 has a second line for each, with the groups inside.
    files = {name.removeprefix("total_"): int(value) for name, value in map(str.split, lines)}
    return int(used) - files.get("inactive_file", 0) - files.get("active_file", 0)


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
