"""benchmarks/peers.py with the one peer that this environment has, sentence-transformers behind FastAPI."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread

import numpy as np
import peers
import pytest
import rounds
import tiny_models
from conftest import REPO, without_settings
from loads import Gateway, Sample, Server, Stream
from openai import OpenAI
from other_work import OtherWork
from peer_servers import Venv, vectors
from sentence_transformers import SentenceTransformer
from serving_report import print_rates
from started_server import Started, free_ports

TEXTS = ["the water boils", "a network of air", "press"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_models.make("bert_mean", tmp_path_factory.mktemp("model"))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, on as little as it measures with."""
    moment = ("--rounds", "1", "--seconds", "0.3", "--warm-up", "0.1", "--allow-other-work", "1")
    venv = os.environ.get("NV_EMBED_SERVER_VENV") or os.environ.get("VENV") or str(REPO / ".venv")
    environ = without_settings() | {"RUNTIME": "pip", "VENV": venv}
    command = [sys.executable, REPO / "benchmarks" / "peers.py", *moment, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=environ)


@pytest.mark.slow
def test_the_fastapi_peer_gives_the_openai_package_the_vectors_of_the_library(model, tmp_path):
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "uvicorn", "fastapi_server:app", "--app-dir", REPO / "benchmarks" / "peers"),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    environ = os.environ | {"MODEL": str(model)}
    with Started(command, f"{url}/health", tmp_path / "log.txt", environ):
        with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            as_base64 = client.embeddings.create(model="any", input=TEXTS)  # what the package asks for by itself
            as_floats = client.embeddings.create(model="any", input=TEXTS[0], encoding_format="float")
        as_the_benchmark_asks = vectors(Gateway("fastapi", url), TEXTS)
    expected = SentenceTransformer(str(model), device="cpu").encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(as_the_benchmark_asks, expected, atol=1e-5)
    np.testing.assert_allclose([row.embedding for row in as_base64.data], expected, atol=1e-5)
    np.testing.assert_allclose(as_floats.data[0].embedding, expected[0], atol=1e-5)


@pytest.mark.server
def test_this_server_and_a_peer_are_started_and_measured_by_one_command(model):
    done = run("--targets", "nv-embed-grpc,nv-embed-float32,fastapi", "--model", model, "--fastapi-venv", sys.prefix)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    results = {(result["load"], result["target"]): result for result in answer["results"]}
    loads = ("1 client", "16 clients", "documents", "bulk beside", "queries beside")
    assert results.keys() == {
        (load, target) for load in loads for target in ("nv-embed-grpc", "nv-embed-float32", "fastapi")
    }
    for (load, target), result in results.items():
        assert result["errors"] == {}, (load, target)
        assert result["requests"] > 0 or load == "queries beside"  # which come at random times
    assert answer["ratios"]["documents: nv-embed-float32 / fastapi"]["median"] > 0
    assert answer["dtypes"]["nv-embed-float32"] == "float32"
    assert min(answer["lowest_cosine"].values()) > 0.999
    assert answer["versions"]["fastapi"]["sentence-transformers"]
    assert not any(answer["void_rounds"].values())


def test_an_environment_that_is_missing_is_named_with_the_command_that_makes_it(tmp_path):
    done = run("--infinity-venv", tmp_path / "none", "--fastapi-venv", sys.prefix)
    assert done.returncode == 2
    assert f"pip install -r {REPO}/benchmarks/peers/infinity.txt" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_target_with_other_vectors_is_found(model, monkeypatch):
    rows = np.tile(np.eye(4), (3, 1))
    wrong = rows.copy()
    wrong[-1] = rows[0]
    monkeypatch.setattr(Venv, "output", lambda *_arguments, text: json.dumps(rows.tolist()))
    monkeypatch.setattr(peers, "vectors", lambda server, texts: {"right": 2 * rows, "wrong": wrong}[server.name])
    lowest, others = peers.different([Server("right", ""), Server("wrong", "")], Venv("fastapi", model), model)
    assert lowest == {"right": 1.0, "wrong": 0.0}
    assert others == ["wrong"]


def test_a_round_beside_other_work_is_void_for_all_targets_and_run_again(monkeypatch):
    shares = iter([0.0, 0.3, *[0.01] * 100])  # the first load's second target is disturbed in the first round
    monkeypatch.setattr(rounds, "other_work", lambda *_: OtherWork(next(shares), "somebody"))

    async def answered(self, load, seconds, seed):
        return {stream.name: Sample([0.1], num_texts=1, seconds=1.0) for stream in load}

    monkeypatch.setattr(Server, "run", answered)
    servers = [Server(name, "") for name in ("nv-embed", "fastapi")]
    found = rounds.Rounds(peers.parse(["--rounds", "2"]), servers, peers.LOADS)
    found.run()
    assert found.void == {"1 client": 1}
    streams = ("1 client", "16 clients", "documents", "bulk beside", "queries beside")
    assert list(found.samples) == [(stream, target) for stream in streams for target in ("nv-embed", "fastapi")]
    assert {len(samples) for samples in found.samples.values()} == {2}


def test_ratios_say_how_much_faster_this_server_is_also_where_only_waiting_differs(capsys):
    def sample(texts_per_second: float, latency: float) -> Sample:
        return Sample([latency], num_texts=round(2 * texts_per_second), seconds=2.0)

    samples = {
        ("documents", "nv-embed"): [sample(40, 0.1), sample(60, 0.1)],
        ("documents", "fastapi"): [sample(20, 0.1), sample(20, 0.1)],
        ("queries beside", "nv-embed"): [sample(5, 0.1), sample(5, 0.1)],
        ("queries beside", "fastapi"): [sample(5, 0.4), sample(5, 0.6)],
    }
    assert peers.print_ratios(samples, ["nv-embed", "fastapi"]) == {
        "documents: nv-embed / fastapi": {"median": 2.5, "low": 2.0, "high": 3.0},
        "queries beside, p99: fastapi / nv-embed": {"median": 5.0, "low": 4.0, "high": 6.0},
    }
    assert "2.5 (2 to 3)" in capsys.readouterr().out


def read_texts(file) -> int:
    """A request; returns its number of texts."""
    length = 0
    while (line := file.readline()) != b"\r\n":
        if line.lower().startswith(b"content-length:"):
            length = int(line.partition(b":")[2])
    return len(json.loads(file.read(length))["input"])


def ok(num_texts: int) -> bytes:
    body = json.dumps({"data": [{"embedding": "AAAAAA=="}] * num_texts}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@contextmanager
def served(handler):
    """Its address."""
    with ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_a_server_may_close_connections_that_were_idle(capsys):
    class Once(StreamRequestHandler):
        """Answers one request, and closes without having said so."""

        def handle(self):
            self.wfile.write(ok(read_texts(self.rfile)))

    with served(Once) as url:
        load = (Stream("queries", True, "short", 1, num_clients=2),)
        sample = asyncio.run(Gateway("closes", url).run(load, 0.2, "seed"))["queries"]
    assert sample.num_texts > 2
    assert not sample.errors
    assert sample.retries > 0
    print_rates({("query", "closes"): [sample, Sample(retries=2)]})
    assert f"query, closes: {sample.retries + 2} requests sent again" in capsys.readouterr().out


def test_an_answer_that_breaks_off_is_not_asked_for_again():
    num_asked = 0

    class Breaks(StreamRequestHandler):
        """Answers one request, and the second one in part."""

        def handle(self):
            nonlocal num_asked
            num_asked += 1
            self.wfile.write(ok(read_texts(self.rfile)))
            read_texts(self.rfile)
            num_asked += 1
            self.wfile.write(b"HTTP/1.1 2")
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset

    with served(Breaks) as url:
        load = (Stream("queries", True, "short", 1, num_clients=1),)
        sample = asyncio.run(Gateway("breaks", url).run(load, 0.2, "seed"))["queries"]
    assert sample.errors.total() > 0
    assert sample.retries == 0
    assert num_asked == 1 + len(sample.latencies) + sample.errors.total()  # the first one connects
