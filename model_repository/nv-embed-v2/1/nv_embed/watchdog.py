"""Ends the server when the model's process dies or freezes, and the model when the server dies; knows no requests.

Triton 24.10 does not notice that a model's process is gone: its clients wait for ever and readiness stays green. So
the model starts a process that holds the other end of a pipe. The pipe closing without a goodbye means death; once a
second a beat comes through it, and silence means a stopped or frozen process. Either way the server is ended: its
clients see the connection break, and whatever supervises the server starts a new one. After a server that was killed,
neither a model that still loads nor the memory that both shared is left.

A server that crashes may hang instead of ending: Triton's handler of a crash allocates memory to print the stack, and
waits for ever if the crash came while memory was allocated. No client gets an answer then. The threads' signal
masks show it, so this process looks at them.

A server that stops closes its doors first, long before it tells the model. Nothing else shows it, and it may not be
asked: a call into it (pb_utils.is_model_ready) while it tears down crashes the model's process. So this process looks
at the sockets on which the server listens, because here that delays no answer.
"""

from __future__ import annotations

import math
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_LISTENING = "0A"  # TCP_LISTEN in the kernel's tables
_SHARED_MEMORY = "/dev/shm/triton_python_backend_shm_region_"  # as this model's backend names it
_BEAT_SECONDS = 1.0
_FIRST_BEAT_SECONDS = 0.1  # until the server's ports are seen open: it may stop as soon as it serves
# No healthy Python process pauses this long. Counted in steps, because a machine or container that was suspended as a
# whole wakes up to a single silent step.
_SILENT_STEPS, _STEP_SECONDS = 4, 2.0
_EXIT_SECONDS = 1.0  # between a process's pipe closing and its exit code being known
_SPEECH_SECONDS = 1.0
_CRASH_SECONDS = 10.0  # for Triton to print its stack: a program for each frame, slow on a busy machine
_GRACE_SECONDS = 4.0  # for the server to end by itself; it would wait 30 s for answers that nobody can give
DRAIN_SECONDS = 20.0  # of the same 30 s: a model answers what it has in them when the server stops
_BEAT, _HELP, _GOODBYE = b"-", b"!", b"."
_DEATH = "the model's process has died"
_HANG = "the server hangs in its handler of a crash"
_CRASHES = (signal.SIGABRT, signal.SIGSEGV)  # what Triton handles by printing its stack
_SERVES, _STOPS = b"o", b"s"  # the other way: what the watchdog says of the server


class Watchdog:
    """The model's end of the pipe."""

    def __init__(self, model_name: str) -> None:
        """Start watching this process and its parent, the server. Silence is no concern before `start_beating`."""
        python = shutil.which("python3")  # inside Triton sys.executable is not Python
        assert python is not None, "Triton itself finds this process's Python by PATH"
        # A session of its own: Ctrl-C in a terminal is for the server, not for the watchdog.
        self._process = subprocess.Popen(
            [python, "-I", __file__, str(os.getpid()), str(os.getppid()), model_name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
        )  # fmt: skip
        self._is_over, self._serves = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="nv-embed-watchdog", daemon=True)

    def start_beating(self) -> None:
        """From now on a silence counts as a frozen process."""
        self._thread.start()

    def wait_for_stop(self) -> bool:
        """Return when the server has begun to stop: True; or when the watch is over: False."""
        assert self._process.stdout is not None
        while (word := self._process.stdout.read(1)) == _SERVES:
            self._serves.set()
        return word == _STOPS

    def ask_for_restart(self) -> None:
        """Have the server ended although this process lives: it is beyond repair, or owes an answer it cannot give."""
        if not self._say(_HELP):
            os.kill(os.getppid(), signal.SIGTERM)

    def stop(self) -> None:
        """Say goodbye; the server goes on without a watchdog. Does not wait: it may be waiting for the server."""
        self._is_over.set()
        self._say(_GOODBYE)

    def _beat(self) -> None:
        self._say(_BEAT)
        while not self._is_over.wait(_BEAT_SECONDS if self._serves.is_set() else _FIRST_BEAT_SECONDS):
            self._say(_BEAT)

    def _say(self, word: bytes) -> bool:
        """Returns whether the watchdog is still there."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(word)
            return True
        except BrokenPipeError:  # somebody killed the watchdog; that is no reason to stop serving
            self._is_over.set()
            return False


class Doors:
    """The sockets on which a server listens.

    The server's descriptors show that one is closed. The kernel's table of listening sockets is no evidence, because
    it changes while it is read and may miss one. So a look at it can only add a door.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._doors = frozenset[int]()
        self._were_closing = False

    @property
    def were_open(self) -> bool:
        """Whether any was ever seen."""
        return bool(self._doors)

    def are_closing(self) -> bool:
        """Look; True once, when the server has closed a socket on which it listened."""
        sockets = open_sockets(self._pid)
        if sockets is None:  # nothing can be seen, which is no evidence either
            return False
        were_closing, self._were_closing = self._were_closing, self._were_closing or not self._doors <= sockets
        self._doors |= sockets & listening_sockets(self._pid)
        return self._were_closing and not were_closing


class CrashHandler:
    """What a server does last; the thread that runs it blocks its signal meanwhile."""

    def __init__(self, pid: int, patience_seconds: float = _CRASH_SECONDS) -> None:
        self._pid, self._patience_seconds = pid, patience_seconds
        # Threads, each with a signal that it did not block in two looks in a row. Some threads of libraries block all
        # for good when they begin.
        self._were_open: set[tuple[int, int]] = set()
        self._last_open: set[tuple[int, int]] = set()
        self._running_since = math.inf
        self._next_look, self._pause_seconds = -math.inf, 0.0

    def hangs(self) -> bool:
        """Whether it has been running for longer than printing a stack takes. Looks, unless it has just done so.

        A look reads a file for each of the server's threads. Each further model brings threads, and a watchdog that
        looks at all of them, so looks that followed every beat cost a whole core beside some twenty models.
        """
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._pause_seconds = min(2 * self._pause_seconds + _FIRST_BEAT_SECONDS, self._patience_seconds / 4)
        self._next_look = now + self._pause_seconds
        blocked = blocked_signals(self._pid)
        now_blocked = {(thread, number) for thread, numbers in blocked.items() for number in numbers}
        is_running = bool(self._were_open & now_blocked)
        now_open = {(thread, int(number)) for thread in blocked for number in _CRASHES} - now_blocked
        self._were_open |= now_open & self._last_open
        self._last_open = now_open
        self._running_since = min(self._running_since, now) if is_running else math.inf
        return now - self._running_since > self._patience_seconds


def watch(
    pipe: int, server: int, on_step: Callable[[], str | None] = lambda: None, step_seconds: float = _STEP_SECONDS
) -> str | None:
    """Wait for what ends the watch: a goodbye, None; or what went wrong with the model or its server.

    Args:
        pipe: file descriptor of what the model says.
        server: pidfd of the server.
        on_step: called with the model's beats, about once a second and at first more often; may find what went wrong.
        step_seconds: length of a step; some silent ones in a row mean a frozen model.
    """
    has_beaten, silent_steps = False, 0
    while silent_steps < _SILENT_STEPS:
        ready, _, _ = select.select([pipe, server], [], [], step_seconds)
        if pipe in ready:
            words = os.read(pipe, 4096)
            if _GOODBYE in words:
                return None
            if _HELP in words:
                return "the model asks for a restart"
            if not words:
                return _DEATH
            has_beaten, silent_steps = True, 0
            if trouble := on_step():
                return trouble
        elif server in ready:
            return "the server is gone"  # killed, or stopped on purpose while the model still loads
        elif has_beaten:
            silent_steps += 1
    return f"the model's process has been silent for {_SILENT_STEPS * step_seconds:.0f} s"


def shared_memory(pid: int) -> set[Path]:
    """Files of the memory that a model shares with its server, which removes them unless it is killed."""
    maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    return {Path(_SHARED_MEMORY + part.split()[0]) for part in maps.split(_SHARED_MEMORY)[1:]}


def how_it_ended(pid: int, process: int) -> str:
    """Exit code, or signal as a negative number, of a dead process that its parent has not waited for; "" if unknown.

    Args:
        pid: its number.
        process: its pidfd.
    """
    if not select.select([process], [], [], _EXIT_SECONDS)[0]:
        return ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:  # its parent has waited for it
        return ""
    return f" with exit code {os.waitstatus_to_exitcode(int(fields[-1]))}"


def open_sockets(pid: int) -> frozenset[int] | None:
    """Inodes of a process's sockets, from proc(5); None if it ends or must not be looked at."""
    links = set()
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                links.add(os.readlink(descriptor))
    except OSError:  # of a process that is being killed everything is root's, before it is gone
        return None
    return frozenset(int(link[len("socket:[") : -1]) for link in links if link.startswith("socket:["))


def listening_sockets(pid: int) -> frozenset[int]:
    """Inodes of the TCP sockets that wait for connections in a process's network namespace, most of them at least."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):  # a machine without IPv6, or a process that ends
            for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING:
                    inodes.add(int(fields[9]))
    return frozenset(inodes)


def blocked_signals(pid: int) -> dict[int, frozenset[int]]:
    """Signals that each thread of a process blocks, from proc(5)."""
    blocked = {}
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):  # a thread that has ended
            status = (task / "status").read_text(encoding="utf-8", errors="replace")
            mask = int(status.partition("SigBlk:")[2].split()[0], 16)
            blocked[int(task.name)] = frozenset(number for number in range(1, 65) if mask >> (number - 1) & 1)
    return blocked


def children(pid: int) -> set[int]:
    """Processes that a server started and that have not ended. When it stops, a model's ends once all is answered."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # one that has ended
            stat = (process / "stat").read_text(encoding="utf-8", errors="replace")
            state, parent = stat.rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.add(int(process.name))
    return found


def end(
    process: int,
    with_signal: signal.Signals,
    is_at_work: Callable[[], bool] = lambda: False,
    grace_seconds: float = _GRACE_SECONDS,
) -> None:
    """Send a signal to the process behind a pidfd, and after a time of grace the one that cannot be ignored.

    The time of grace does not begin while `is_at_work` says so, for DRAIN_SECONDS at the most.
    """
    latest = time.monotonic() + DRAIN_SECONDS
    for each in (with_signal, signal.SIGKILL):
        try:
            signal.pidfd_send_signal(process, each)
        except ProcessLookupError:
            return
        begun = time.monotonic()
        while time.monotonic() < begun + grace_seconds:
            if select.select([process], [], [], grace_seconds / 4)[0]:
                return
            if is_at_work():
                begun = min(time.monotonic(), latest)


def main() -> None:
    """The watching process: watchdog.py MODEL_PID SERVER_PID MODEL_NAME, the pipe as standard input."""
    model_pid, server_pid, model_name = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    try:
        model, server = os.pidfd_open(model_pid), os.pidfd_open(server_pid)
        regions = shared_memory(model_pid)
    except (ProcessLookupError, FileNotFoundError):
        return  # over before it began
    doors, crash_handler = Doors(server_pid), CrashHandler(server_pid)

    def look() -> str | None:
        were_open = doors.were_open
        news = _STOPS if doors.are_closing() else _SERVES if doors.were_open and not were_open else b""
        with suppress(BrokenPipeError):  # nobody waits to hear it
            os.write(sys.stdout.fileno(), news)
        return _HANG if crash_handler.hangs() else None

    trouble = watch(sys.stdin.fileno(), server, look)
    if trouble is not None:
        if trouble == _DEATH:
            trouble += how_it_ended(model_pid, model)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        words = f"{now} {model_name} watchdog: {trouble}; ending what is left\n"
        speech = threading.Thread(target=os.write, args=(sys.stderr.fileno(), words.encode()), daemon=True)
        speech.start()
        speech.join(_SPEECH_SECONDS)  # a log that nobody reads must not keep it from acting
        if trouble == _HANG:
            end(server, signal.SIGKILL)
        else:
            end(server, signal.SIGTERM, lambda: bool(children(server_pid) - {model_pid}))
        end(model, signal.SIGKILL)
        for region in regions:
            region.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
