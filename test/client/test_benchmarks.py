"""The gateway is measured beside its server by one command; how fast it is is another matter."""

import json
import subprocess
import sys

from conftest import REPO


def test_the_gateway_is_a_target_of_the_serving_benchmark(server):
    done = subprocess.run(
        [
            *(sys.executable, REPO / "benchmarks" / "serving.py", "--url", server.url, "--gateway"),
            *("--loads", "query,documents", "--lengths", "short", "--documents", "4", "--document-clients", "2"),
            *("--clients", "2", "--rounds", "2", "--seconds", "0.5", "--warm-up", "0.1", "--allow-other-work", "1"),
        ],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    results = {(result["load"], result["target"]): result for result in answer["results"]}
    for load in ("query", "documents"):
        for target in ("server", "gateway"):
            assert results[load, target]["requests"] > 0
            assert results[load, target]["errors"] == {}
        assert answer["ratios"][f"{load}: gateway / server"]["median"] > 0
    spent = {(row["load"], row["target"]): row for row in answer["core_ms_per_request"]}
    assert all(spent["query", "gateway"][who] is not None for who in ("tritonserver", "model", "gateway", "client"))
    assert spent["query", "gateway"]["gateway"] > 0
    assert spent["query", "server"]["gateway"] is None
