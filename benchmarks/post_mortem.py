"""How a server ended: its last words and the stack of its core dump. Only reads."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

_NUM_LINES = 40
_SUPERVISOR = b"supervise.sh: ended with"  # and the exit code, once a server is gone


def last_words(log: Path, since: int) -> str:
    """The end of what a server logged that was seen well at a place in its log, its supervisor's verdict included."""
    content = log.read_bytes()
    end = content.find(b"\n", content.find(_SUPERVISOR, since))
    lines = content[:end].decode("utf-8", "replace").splitlines()
    return "\n".join([line[:200] for line in lines if not line.startswith(("|", "+--"))][-_NUM_LINES:])


def stack_of(core: Path) -> str:
    """The stack of the thread that crashed, if gdb is installed."""
    with core.open("rb") as file:  # notes at the beginning name the mapped files
        executable = re.search(rb"/[^\0]+/(tritonserver|triton_python_backend_stub)(?=\0)", file.read(2**20))
    gdb = shutil.which("gdb")
    if executable is None or gdb is None:
        return f"{core}: expected gdb and a core of tritonserver or its stub; install gdb and look yourself"
    command = [gdb, "-batch", "-ex", "bt 30", executable[0].decode(), str(core)]
    said = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stdout
    lines = [line[:200] for line in said.splitlines() if line.startswith(("#", "Program terminated"))]
    return "\n".join([f"{core}, {executable[1].decode()}:", *lines])
