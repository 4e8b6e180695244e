"""Quotas and memory limits of control groups of both versions, in folders made for the purpose, and on this machine."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
from nv_embed.compute.host import free_memory, most_cores, reserve_memory, reserved_memory

AVAILABLE = 8 * 2**30


@pytest.fixture
def machine(tmp_path):
    """Writes files; returns the root folder."""

    def write(cgroup, files):
        files = {
            "proc/self/cgroup": cgroup,
            "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {AVAILABLE // 1024} kB\n",
        } | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path

    return write


V1 = "9:name=systemd:/\n4:memory:/docker/ab\n1:cpuacct,cpu:/docker/ab\n0::/"


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/", {}, math.inf),
        ("0::/", {"cpu.max": "max 100000"}, math.inf),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),  # of the group around it
        ("0::/a/b", {"a/b/cpu.max": "200000 100000", "a/cpu.max": "300000 100000"}, 2),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        (V1, {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 2.5),  # as a container sees it
        (V1, {"cpuacct,cpu/docker/cpu.cfs_quota_us": "50000", "cpuacct,cpu/docker/cpu.cfs_period_us": "100000"}, 0.5),
        (V1, {"cpu/docker/ab/cpu.cfs_quota_us": "400000", "cpu/docker/ab/cpu.cfs_period_us": "100000"}, 4),
    ],
)  # fmt: skip
def test_the_lowest_quota_of_all_groups_around_the_process_counts(machine, cgroup, files, cores):
    assert most_cores(machine(cgroup, files)) == cores


V2_STAT = "anon 1\ninactive_file 1500000000\nactive_file 500000000"
V1_USED = {
    "memory/memory.limit_in_bytes": "2000000000",
    "memory/memory.usage_in_bytes": "1500000000",
    "memory/memory.stat": "active_file 1\ninactive_file 1\ntotal_active_file 600000000\ntotal_inactive_file 400000000",
}


@pytest.mark.parametrize(
    ("cgroup", "files", "num_bytes"),
    [
        ("0::/", {}, AVAILABLE),
        ("0::/", {"memory.max": "max", "memory.high": "max"}, AVAILABLE),
        ("0::/", {"memory.max": "4000000000", "memory.high": "max"}, 4_000_000_000),
        ("0::/", {"memory.max": "4000000000", "memory.high": "3000000000"}, 3_000_000_000),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "2000000000"}, 2_000_000_000),
        ("0::/", {"memory.max": str(2**40)}, AVAILABLE),
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712"}, AVAILABLE),
        (V1, {"memory/memory.limit_in_bytes": "1000000000"}, 1_000_000_000),
        (V1, {"memory/docker/ab/memory.limit_in_bytes": "1000000000"}, 1_000_000_000),
        ("4:memory:/x\n0::/y", {"unified/y/memory.max": "5000000000"}, 5_000_000_000),
        ("0::/", {"memory.max": "4000000000", "memory.current": "1000000000"}, 3_000_000_000),
        ("0::/", {"memory.max": "4000000000", "memory.current": "3000000000", "memory.stat": V2_STAT}, 3_000_000_000),
        ("0::/", {"memory.max": "max", "memory.current": "3000000000"}, AVAILABLE),
        ("0::/", {"memory.max": "1000", "memory.current": "2000"}, 0),
        (V1, V1_USED, 1_500_000_000),
    ],
)
def test_the_lowest_memory_limit_counts_and_no_more_than_is_free(machine, cgroup, files, num_bytes):
    assert free_memory(machine(cgroup, files)) == num_bytes


def test_a_machine_without_control_groups_is_limited_by_nothing_else(machine):
    root = machine("0::/", {})
    (root / "proc/self/cgroup").unlink()
    assert most_cores(root) == math.inf
    assert free_memory(root) == AVAILABLE


RESERVES = """
import sys
from nv_embed.compute.host import reserve_memory, reserved_memory
reserve_memory(int(sys.argv[1]))
print(reserved_memory(), flush=True)
sys.stdin.read()
"""


def test_what_a_process_reserves_others_of_its_parent_see_until_it_ends():
    def start(num_bytes):
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", RESERVES, str(num_bytes)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, text=True)

    reserve_memory(5)  # not of their server, but the parent of them all
    with start(30) as first:
        assert first.stdout.readline() == "0\n"  # its own does not count
        with start(200) as second:
            assert second.stdout.readline() == "30\n"
            assert reserved_memory() == 0
            first.communicate("")
            with start(1000) as third:
                assert third.stdout.readline() == "200\n"


def test_on_this_machine_both_are_found():
    assert most_cores() > 0
    assert 0 < free_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


PRODUCTS = """
from nv_embed.compute.host import keep_few_products
if {keeps_few}:
    keep_few_products()
import torch
weight = torch.ops.mkldnn._reorder_linear_weight(torch.randn(64, 64), 64)
for num_rows in (*range(1, 200), 1):  # the first size comes again
    torch.ops.mkldnn._linear_pointwise(torch.randn(num_rows, 64), weight, None, "none", [], "")
"""


@pytest.mark.parametrize(
    ("keeps_few", "operators_own", "again"),
    [(True, None, "cache_miss"), (False, None, "cache_hit"), (True, "1024", "cache_hit")],
)
def test_what_onednn_prepared_for_a_size_of_products_is_dropped_after_some_others(keeps_few, operators_own, again):
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "ONEDNN_VERBOSE": "profile_create"}
    if operators_own:
        environment |= dict.fromkeys(("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"), operators_own)
    command = [sys.executable, "-c", PRODUCTS.format(keeps_few=keeps_few)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    created = [line for line in said.splitlines() if ",create:" in line]
    assert f",create:{again}," in created[-1]
