"""Whether others used the processors while something was measured, on a made-up /proc and on this machine's own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import other_work as other_work_module
import pytest
from other_work import moment, other_work, processors_of, seconds_between
from processes import all_processes, is_here, processes_behind

NAMES = {10: "benchmark", 11: "a child) of it", 20: "tritonserver", 21: "triton_python_b", 30: "compiler"}
PARENTS = {10: 1, 11: 10, 20: 1, 21: 20, 30: 1}


@pytest.fixture
def proc(tmp_path, monkeypatch):
    """Where own processes may run on processor 1 only."""
    monkeypatch.setattr(other_work_module, "processors_of", lambda _: {1})
    (tmp_path / "net").mkdir()
    return tmp_path


def write(proc, used, *, user=0, idle=0, softirq=0, steal=0, reaped=None, elsewhere=0):
    """A /proc at one moment; times in ticks, `elsewhere` of what processor 0 was busy."""
    (proc / "stat").write_text(
        f"cpu  {user + elsewhere} 0 0 {idle} 0 0 {softirq} {steal} 0 0\ncpu0 {elsewhere} 0 0 0 0 0 0 0 0 0\n"
        f"cpu1 {user} 0 0 {idle} 0 0 {softirq} {steal} 0 0\nintr 5\n"
    )
    for pid in NAMES:
        folder = proc / str(pid)
        if pid not in used:
            if folder.exists():
                (folder / "stat").unlink()
            continue
        (folder / "fd").mkdir(parents=True, exist_ok=True)
        (folder / "stat").write_text(
            f"{pid} ({NAMES[pid]}) S {PARENTS[pid]} 0 0 0 0 0 0 0 0 0 {used[pid]} 0 {(reaped or {}).get(pid, 0)} 0 0 0"
        )


def listen(proc, pid, port):
    """A process listens on a port, and a client (socket 5) is connected."""
    row = "0: 0100007F:{:04X} 00000000:0000 {} 00000000:00000000 00:00000000 00000000 0 0 {} 1 0 100 0 0 10 0\n"
    (proc / "net" / "tcp").write_text("header\n" + row.format(port, "01", 5) + row.format(port, "0A", 77))
    (proc / str(pid) / "fd" / "3").symlink_to("socket:[77]")


def test_the_time_of_others_is_what_the_own_processes_did_not_use(proc):
    write(proc, {10: 100, 11: 5, 20: 7, 21: 50, 30: 1000}, user=2000, idle=5000)
    before = moment(proc)
    write(proc, {10: 120, 11: 15, 20: 17, 21: 90, 30: 1020}, user=2100, idle=5100)
    work = other_work(before, moment(proc), [10, 20])
    assert work.share == pytest.approx(20 / 200)
    assert str(work) == "others used 10 % of the processors, most of it compiler (pid 30)"


def test_only_processors_on_which_own_processes_may_run_count(proc):
    write(proc, {10: 100, 30: 1000}, user=2000, idle=5000)
    before = moment(proc)
    write(proc, {10: 150, 30: 1030}, user=2080, idle=5020, elsewhere=9000)
    assert other_work(before, moment(proc), [10]).share == pytest.approx(30 / 100)


def test_a_process_may_run_on_the_processors_of_its_affinity():
    assert processors_of([os.getpid()]) == os.sched_getaffinity(0)
    assert processors_of([2**22 + 1]) == set()  # no pid is that high


def test_an_own_process_that_ends_meanwhile_is_not_taken_for_others(proc):
    write(proc, {10: 100, 11: 500}, user=2000, idle=5000)
    before = moment(proc)
    write(proc, {10: 110}, user=2050, idle=5150, reaped={10: 540})
    assert other_work(before, moment(proc), [10]).share == pytest.approx(0.0)


def test_interrupts_and_other_guests_of_the_host_are_others(proc):
    write(proc, {10: 0}, user=0, idle=0)
    before = moment(proc)
    write(proc, {10: 50}, user=50, softirq=4, steal=26, idle=120)
    work = other_work(before, moment(proc), [10])
    assert work.share == pytest.approx(30 / 200)
    assert "other guests" in work.by


def test_a_server_is_found_by_who_listens_and_so_is_its_child(proc):
    write(proc, {10: 0, 20: 0, 21: 0, 30: 0})
    listen(proc, 20, 8001)
    (proc / "30" / "fd" / "3").symlink_to("socket:[5]")  # a client's connection
    processes = all_processes(proc)
    assert processes_behind("localhost:8001", processes, proc) == {20, 21}
    assert processes_behind("192.0.2.1:8001", processes, proc) == set()  # another machine's


def test_a_server_is_not_an_own_one_because_something_else_forwards_to_another_machine(proc):
    write(proc, {10: 0, 20: 0, 21: 0, 30: 0})
    listen(proc, 30, 8001)
    assert processes_behind("localhost:8001", all_processes(proc), proc) == {30}


def test_a_server_whose_listener_is_hidden_is_any_triton_server_of_this_machine(proc):
    write(proc, {10: 0, 20: 0, 21: 0, 30: 0})
    assert processes_behind("127.0.0.1:8001", all_processes(proc), proc) == {20, 21}


def test_this_machine_is_told_from_others():
    assert all(is_here(host) for host in ("localhost", "127.0.0.1"))
    assert not is_here("192.0.2.1")  # of a network that is for examples


def test_a_busy_process_is_others_unless_it_is_an_own_child():
    spin = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    before = moment()
    with subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        after = moment()
        assert seconds_between(before, after, [process.pid]) == pytest.approx(0.5, abs=0.2)
        own = other_work(before, after, [os.getpid()])
        beside = other_work(before, after, [])
        process.communicate(b"\n")
    # The kernel counts in ticks, and the machine may be busy with anything else, so only the difference is sure.
    total = sum(after.processors[n].total - before.processors[n].total for n in after.processors)
    assert beside.share - own.share > 0.3 * 0.5 / total


def test_who_listens_on_a_real_port_is_found():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert os.getpid() in processes_behind(f"127.0.0.1:{listener.getsockname()[1]}", all_processes())
