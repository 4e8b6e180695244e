"""What the watchdog sees of processes; the rest of it is tested on a real server in test_faults.py."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress

import pytest
from nv_embed import watchdog


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def test_open_sockets_and_listening_ones_are_told_apart():
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0)))]
        with suppress(OSError):  # a machine without IPv6
            listeners.append(stack.enter_context(socket.create_server(("::1", 0), family=socket.AF_INET6)))
        connection = stack.enter_context(socket.create_connection(listeners[0].getsockname()))
        doors = {inode(listener) for listener in listeners}
        assert watchdog.open_sockets(os.getpid()) >= {*doors, inode(connection)}
        assert watchdog.listening_sockets(os.getpid()) >= doors
        assert inode(connection) not in watchdog.listening_sockets(os.getpid())
        assert not doors & watchdog.open_sockets(os.getppid())
    assert not doors & watchdog.open_sockets(os.getpid())


def test_doors_are_closing_once_when_a_listening_socket_is_closed_but_not_a_connection():
    doors = watchdog.Doors(os.getpid())
    assert not doors.were_open
    with socket.create_server(("127.0.0.1", 0)) as other, socket.create_server(("127.0.0.1", 0)) as door:
        assert not doors.are_closing()
        assert doors.were_open
        with socket.create_connection(door.getsockname()), door.accept()[0]:
            assert not doors.are_closing()
        assert not doors.are_closing()
        door.close()
        assert doors.are_closing()
        assert not doors.are_closing()
        other.close()
        assert not doors.are_closing()


def test_doors_are_not_closing_however_often_the_kernels_table_misses_one(monkeypatch):
    doors = watchdog.Doors(os.getpid())
    with socket.create_server(("127.0.0.1", 0)) as door:
        assert not doors.are_closing()
        with monkeypatch.context() as patch:
            patch.setattr(watchdog, "listening_sockets", lambda pid: frozenset())
            assert not any(doors.are_closing() for _ in range(5))
            patch.setattr(watchdog, "open_sockets", lambda pid: None)  # nor when nothing can be seen
            assert not any(doors.are_closing() for _ in range(5))
        door.close()
        assert doors.are_closing()


def test_a_process_that_is_gone_shows_nothing():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert watchdog.open_sockets(process.pid) is None
    assert watchdog.listening_sockets(process.pid) == frozenset()


@pytest.fixture
def server():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        (b"-.", None),
        (b"-", "the model's process has died"),
        (b"", "the model's process has died"),
        (b"-!", "the model asks for a restart"),
    ],
)
def test_a_closed_pipe_means_death_unless_a_goodbye_came(server, words, verdict):
    reader, writer = os.pipe()
    os.write(writer, words)
    os.close(writer)
    assert watchdog.watch(reader, os.pidfd_open(server.pid)) == verdict


def test_silence_means_a_frozen_model_but_only_after_a_first_beat(server):
    reader, writer = os.pipe()
    os.write(writer, b"-")
    assert "has been silent" in watchdog.watch(reader, os.pidfd_open(server.pid), step_seconds=0.02)
    loading, _ = os.pipe()
    threading.Timer(1.0, server.terminate).start()  # after many steps of silence
    assert watchdog.watch(loading, os.pidfd_open(server.pid), step_seconds=0.02) == "the server is gone"
    os.close(writer)


def test_the_exit_code_of_a_dead_process_is_known_until_its_parent_asks_for_it():
    for script, verdict in (("exit(3)", 3), ("import os; os.abort()", -signal.SIGABRT)):
        with subprocess.Popen([sys.executable, "-c", script]) as process:
            pidfd = os.pidfd_open(process.pid)
            select.select([pidfd], [], [])
            assert watchdog.how_it_ended(process.pid, pidfd) == f" with exit code {verdict}"
            process.wait()
            assert watchdog.how_it_ended(process.pid, pidfd) == ""


def test_a_crash_handler_hangs_when_its_signal_stays_blocked_for_longer_than_printing_takes():
    with subprocess.Popen([sys.executable, "-c", BLOCKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:

        def go_on() -> None:
            server.stdin.write(b"\n")
            server.stdin.flush()
            server.stdout.readline()

        server.stdout.readline()  # SIGSEGV is blocked from the start
        handler, patient = watchdog.CrashHandler(server.pid, patience_seconds=0.0), watchdog.CrashHandler(server.pid)
        looks = range(5)  # the second that sees a handler run would call it hanging
        assert not any(handler.hangs() or patient.hangs() for _ in looks)
        go_on()  # a thread begins that blocks all signals for good, as some of a driver do
        assert not any(handler.hangs() or patient.hangs() for _ in looks)
        go_on()  # one that did not block SIGABRT does so now
        assert [handler.hangs() for _ in looks] == [False, True, True, True, True]
        assert not any(patient.hangs() for _ in looks)
        go_on()  # unblocked: it had only been slow
        assert not any(handler.hangs() for _ in looks)
        server.kill()


def test_beats_in_quick_succession_do_not_all_look_at_every_thread(monkeypatch):
    """A look reads a file for each, and a server of many models has hundreds of threads and many watchdogs."""
    looks = []
    monkeypatch.setattr(watchdog, "blocked_signals", lambda pid: looks.append(pid) or {})
    handler = watchdog.CrashHandler(os.getpid())
    assert not any(handler.hangs() for _ in range(1000))
    assert 1 <= len(looks) < 100


BLOCKER = """
import signal, sys, threading, time
def mask(how, signals):
    signal.pthread_sigmask(how, signals)
    print(flush=True)
def block_all():
    mask(signal.SIG_BLOCK, range(1, 65))
    time.sleep(60)
def work():
    sys.stdin.readline()
    threading.Thread(target=block_all).start()
    sys.stdin.readline()
    mask(signal.SIG_BLOCK, [signal.SIGABRT])
    sys.stdin.readline()
    mask(signal.SIG_UNBLOCK, [signal.SIGABRT])
    time.sleep(60)
threading.Thread(target=work).start()
mask(signal.SIG_BLOCK, [signal.SIGSEGV])
time.sleep(60)
"""


def test_end_kills_what_does_not_heed_its_signal():
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as stubborn:
        stubborn.stdout.readline()
        watchdog.end(os.pidfd_open(stubborn.pid), signal.SIGTERM, grace_seconds=0.2)
        assert stubborn.wait(10) == -signal.SIGKILL


def test_end_does_not_kill_while_others_are_at_work():
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as stubborn:
        stubborn.stdout.readline()
        answers = iter([*[True] * 20, False, False])
        watchdog.end(os.pidfd_open(stubborn.pid), signal.SIGTERM, lambda: next(answers, False), grace_seconds=0.1)
        assert next(answers, None) is None  # asked until they were not
        assert stubborn.wait(10) == -signal.SIGKILL


def test_children_are_those_that_live_and_not_theirs():
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(flush=True); input()'])"
    before = watchdog.children(os.getpid())
    with (
        subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child,
        subprocess.Popen([sys.executable, "-c", ""]) as dead,
    ):
        child.stdout.readline()
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # ended, but not waited for
        assert watchdog.children(os.getpid()) - before == {child.pid}
        assert len(watchdog.children(child.pid)) == 1
        child.communicate(b"\n")


def test_a_restart_can_be_asked_for_although_the_watchdog_is_gone():
    script = """
import os, signal, subprocess
from nv_embed.watchdog import Watchdog
watchdog = Watchdog("a model")
pid = int(subprocess.check_output(["pgrep", "--parent", str(os.getpid()), "--full", "watchdog.py"]))
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
watchdog.ask_for_restart()
"""
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {script!r}]); print('unheard')"
    python = os.path.dirname(sys.executable)  # first, lest `python3` be a script with processes of its own
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": f"{python}:{os.environ['PATH']}"}
    result = subprocess.run([sys.executable, "-c", parent], env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGTERM, result.stderr
    assert "unheard" not in result.stdout
