"""The gateway's benchmark runs and ends with one JSON line; what it measures is another matter."""

import json
import subprocess
import sys

from conftest import REPO


def test_the_gateway_benchmark_prints_a_table_and_one_json_line(server):
    done = subprocess.run(
        [
            *(sys.executable, REPO / "benchmarks" / "gateway.py", "--url", server.url),
            *("--clients", "2", "--batch", "4", "--rounds", "2", "--seconds", "0.5"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert any(line.startswith("gateway") for line in table)
    result = json.loads(last)
    assert result["benchmark"] == "gateway"
    assert result["ratio"] > 0
