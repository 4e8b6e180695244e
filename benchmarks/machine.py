"""What a figure was measured on: goes beside every result."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from started_server import ROOT

PACKAGES = ("torch", "transformers", "nvidia-pytriton", "nv-embed-client")


def machine(device: str = "cpu") -> dict[str, str | int | None]:
    """The device by its name, cores, packages that are installed here, date and commit.

    Args:
        device: "cpu" or "cuda:N"; of several with commas between, the first.
    """
    kind, _, number = device.partition(",")[0].partition(":")
    name, driver = _gpu(number or "0") if kind == "cuda" else (_cpu(), None)
    return {
        "device": name,
        "cores": len(os.sched_getaffinity(0)),
        "driver": driver,
        "python": platform.python_version(),
        **{package: found for package in PACKAGES if (found := _version(package))},
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    }


def _cpu() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else platform.machine()


def _gpu(number: str) -> tuple[str | None, str | None]:
    """Name and driver; None where there is no nvidia-smi that says so."""
    query = _output("nvidia-smi", "-i", number, "--query-gpu=name,driver_version", "--format=csv,noheader")
    name, _, driver = (query or "").partition(", ")
    return name or None, driver or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
