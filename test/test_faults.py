"""Faults on a real tritonserver: every request gets one answer, and the server goes on or ends to be restarted."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from nv_embed.metrics import SERIES
from nv_embed.watchdog import shared_memory
from serving import DEADLINE_SECONDS, MODEL_NAME, ROOT, START_SECONDS, Server, bytes_input, eventually

ENGINE = Path("nv-embed-v2", "1", "nv_embed", "compute", "engine.py")  # in a model repository

# Appended to it: texts with a given number of <s> in them break the engine in a given way.
FAULTS = """

_compute = Engine.compute


def _faulty_compute(self, next_batch, pause=nothing):
    import ctypes, os, sys, time
    from nv_embed.errors import DeviceLost, OutOfDeviceMemory

    taken = []

    def next_faulty_batch():
        taken.extend(next_batch() or ())
        for sequence in taken:
            fault = int((sequence.input_ids == 1).sum()) - 1
            if fault == 101:
                raise RuntimeError("a kernel failed")
            if fault == 102:
                raise DeviceLost("cpu failed")
            if fault == 103:
                raise SystemExit("the thread dies")
            if fault == 104:
                ctypes.string_at(0)  # as a library crashes: in this thread, not wherever a signal is taken
            if fault == 105 and len(taken) > 1 or fault == 106:
                raise OutOfDeviceMemory("the batch does not fit in the memory of cpu")
            if fault == 108:
                print("fault 108 waits", file=sys.stderr, flush=True)
                while not os.path.exists(os.environ["FAULT_GATE"]):
                    time.sleep(0.02)
            if fault == 109:
                print("fault 109 works", file=sys.stderr, flush=True)
                time.sleep(3)
        return taken

    computed = _compute(self, next_faulty_batch, pause)
    if computed is None:
        return None
    rows = computed.vectors.copy()
    for row, sequence in zip(rows, taken):
        if int((sequence.input_ids == 1).sum()) - 1 == 107:
            row[3] = float("nan")
    return Computed(rows, computed.seconds)


Engine.compute = _faulty_compute
"""


def fault(number: int) -> str:
    """A text with so many <s> in it."""
    return "<s>" * number


class FaultyServer(Server):
    """Its faults appended to its engine. One core computes one batch at a time: whoever holds it holds the server."""

    def __init__(self, log: Path, toy: Path, repository: Path, arguments=(), **environ: str) -> None:
        self._gate = log.with_suffix(".gate")
        settings = {"MODEL_REPOSITORY": str(repository), "FAULT_GATE": str(self._gate)}
        settings |= {"NV_EMBED_CACHE_MEBIBYTES": "0", "OMP_NUM_THREADS": "1"}
        super().__init__(log, toy, settings | environ, arguments)

    @contextmanager
    def held(self, texts: Sequence[str] = (), model: str = MODEL_NAME) -> Iterator[Clients]:
        """While this lasts the engine computes fault 108, the first text of a request that has these texts, too."""
        self._gate.unlink(missing_ok=True)
        said = self.log_text().count("fault 108 waits")
        clients = Clients(self, [[fault(108), *texts]], model)
        eventually(lambda: self.log_text().count("fault 108 waits") > said)
        try:
            yield clients
        finally:
            self.release()

    def release(self) -> None:
        """Let fault 108 go on."""
        self._gate.touch()

    def num_tokens(self, texts: Sequence[str]) -> int:
        """Of all these, as fed to the network."""
        harmless = [re.sub("(?:<s>)+", "<s>", text) for text in texts]  # each <s> is a token
        counts = self.infer(documents=harmless)["token_counts"]
        return int(counts.sum()) + sum(map(len, texts)) // 3 - sum(map(len, harmless)) // 3

    def wait_for_waiting(self, num_tokens: int) -> None:
        """Return once so many tokens wait while the engine is held."""

        def are_there() -> bool:
            with pytest.raises(triton.InferenceServerException):  # after each answer metrics are published
                self.embed_query("", truncate="no")
            return self.metrics_now()["nv_embed_queue_tokens"] >= num_tokens

        eventually(are_there)


@pytest.fixture(scope="module")
def faulty_repository(tmp_path_factory) -> Path:
    repository = tmp_path_factory.mktemp("repository") / "model_repository"
    shutil.copytree(ROOT / "model_repository", repository)
    with (repository / ENGINE).open("a", encoding="utf-8") as engine:
        engine.write(FAULTS)
    return repository


@pytest.fixture
def start_server(toy, tmp_path, faulty_repository):
    """Starts servers that can be broken; whatever is left of them at the end is stopped."""
    with ExitStack() as stack:

        def start(arguments=(), **environ) -> FaultyServer:
            log = tmp_path / f"log-{len(list(tmp_path.iterdir()))}.txt"
            return stack.enter_context(FaultyServer(log, toy, faulty_repository, arguments, **environ))

        yield start


@pytest.fixture(scope="module")
def faulty_server(toy, tmp_path_factory, faulty_repository):
    """One that survives what is done to it."""
    with FaultyServer(tmp_path_factory.mktemp("server") / "log.txt", toy, faulty_repository) as server:
        yield server
        assert server.stop() == 0


def model_pid(server: Server, model: str = MODEL_NAME) -> int:
    """Of the process that runs model.py."""
    stub = f"triton_python_backend_stub .*/{model}/1/model.py"
    command = ["pgrep", "--parent", str(server.process.pid), "--full", stub]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


class Clients:
    """Requests in flight, each in a thread with a client of its own; what each got, and when."""

    def __init__(self, server: Server, requests: list[list[str]], model: str = MODEL_NAME) -> None:
        self._model = model
        self.outcomes: list[list] = [[] for _ in requests]
        self._threads = [
            threading.Thread(target=self._ask, args=(server, texts, outcomes), daemon=True)
            for texts, outcomes in zip(requests, self.outcomes, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, server, texts, outcomes) -> None:
        with triton.InferenceServerClient(server.url) as client:
            try:
                outcomes.append(client.infer(self._model, [bytes_input("documents", texts)]).as_numpy("embeddings"))
            except triton.InferenceServerException as error:
                outcomes.append(error)

    def wait(self) -> list:
        """One outcome for each request."""
        for thread in self._threads:
            thread.join(DEADLINE_SECONDS)
        assert [len(outcomes) for outcomes in self.outcomes] == [1] * len(self.outcomes)
        return [outcomes[0] for outcomes in self.outcomes]


def texts(count: int, name: str = "one") -> list[str]:
    return [f"words of document {name}, its number {i} among others of its kind" for i in range(count)]


def status(outcome) -> str:
    return "OK" if isinstance(outcome, np.ndarray) else outcome.status().removeprefix("StatusCode.")


# --- the server goes on ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (101, "computing this request failed; the server's log says why"),
        (106, "expected texts that fit on the device; got text {}: the batch does not fit in the memory of cpu"),
        (107, "expected finite numbers from the network; got others for text {}"),
    ],
)
def test_a_failing_text_gets_an_internal_error_and_the_next_is_served(faulty_server, number, message):
    with pytest.raises(triton.InferenceServerException, match=re.escape(message.format(1))) as caught:
        faulty_server.embed_documents(["fine", fault(number)])
    assert caught.value.status() == "StatusCode.INTERNAL"
    tensor = {"name": "documents", "shape": [1, 1], "datatype": "BYTES", "data": [fault(number)]}
    code, answer = faulty_server.post({"inputs": [tensor]})
    assert (code, message.format(0) in answer["error"]) == (500, True)
    assert faulty_server.embed_documents(["fine"]).shape == (1, 64)


def test_a_batch_too_large_for_the_device_is_halved_until_it_fits(faulty_server):
    documents = [*texts(20), fault(105), *texts(40)]
    rows = faulty_server.embed_documents(documents)
    np.testing.assert_allclose(rows[20], faulty_server.embed_documents([fault(105)])[0], atol=1e-5)
    np.testing.assert_allclose(rows[21:], faulty_server.embed_documents(texts(40)), atol=1e-5)
    assert "computing them in halves" in faulty_server.log_text()


def test_a_request_that_waits_longer_than_its_timeout_is_answered_unavailable(faulty_server):
    with faulty_server.held() as slow:
        tensor = {"name": "query", "shape": [1], "datatype": "BYTES", "data": ["late"]}
        code, answer = faulty_server.post({"inputs": [tensor], "parameters": {"timeout": 100_000}})
        assert (code, "within the request's timeout of 100 ms; got none in" in answer["error"]) == (503, True)
        with pytest.raises(triton.InferenceServerException, match="timeout of 100 ms; got none in") as caught:
            faulty_server.client.infer(MODEL_NAME, [bytes_input("query", ["late"])], timeout=100_000)
        assert caught.value.status() == "StatusCode.UNAVAILABLE"
    assert [status(outcome) for outcome in slow.wait()] == ["OK"]


def test_more_than_may_wait_is_answered_unavailable_at_once_and_metrics_tell(start_server):
    server = start_server(NV_EMBED_MAX_QUEUE_TOKENS="70000", NV_EMBED_MAX_SEQUENCE_TOKENS="5000")
    fresh = {name: value for name, value in server.metrics_now().items() if name.startswith("nv_embed_")}
    assert set(fresh.values()) == {0}
    for metric, labels in SERIES:
        name = metric.metric_name + ("_count" if metric.kind == "histogram" else "")
        given = ",".join(f'{label}="{value}"' for label, value in labels)
        assert fresh[f"{name}{{{given}}}" if labels else name] == 0
    bulk = [f"{i} some words to compute" for i in range(3000)]
    with server.held() as slow:
        crowd = Clients(server, [[f"{k} {text}" for text in bulk] for k in range(8)])
        # None of the others can be answered, so as many as fit wait, and the rest is refused.
        eventually(lambda: any(crowd.outcomes))
    outcomes = crowd.wait()
    refusals = [outcome for outcome in outcomes if isinstance(outcome, triton.InferenceServerException)]
    for refusal in refusals:
        assert refusal.status() == "StatusCode.UNAVAILABLE"
        assert "expected at most 70000 tokens to wait; got" in refusal.message()
        assert "retry later" in refusal.message()
    assert 0 < len(refusals) < len(outcomes)
    with pytest.raises(triton.InferenceServerException, match="at most 70000 tokens a request") as caught:
        server.embed_documents([f"{i} {text}" for i in range(4) for text in bulk])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert [status(outcome) for outcome in slow.wait()] == ["OK"]
    num_ok = len(outcomes) - len(refusals)
    counts = {
        f'nv_embed_requests_total{{kind="documents",outcome="{outcome}"}}': number
        for outcome, number in (("ok", num_ok + 1), ("Unavailable", len(refusals)), ("InvalidRequest", 1))
    }
    empty = {"nv_embed_queue_tokens": 0, "nv_embed_queue_bytes": 0}
    metrics = server.metrics_once(lambda metrics: counts.items() | empty.items() <= metrics.items())
    assert metrics['nv_embed_texts_total{source="computed"}'] >= num_ok * len(bulk)
    assert metrics["nv_embed_batch_tokens_sum"] == metrics["nv_embed_tokens_total"] > 0


def test_the_model_is_described_at_once_while_the_queue_is_full(start_server):
    server = start_server(NV_EMBED_MAX_QUEUE_TEXTS="8", NV_EMBED_MAX_REQUEST_DOCUMENTS="8")
    asked = {"parameters": {"model_info": True}, "outputs": ["model_info"]}
    with server.held(texts(7)) as slow:
        with pytest.raises(triton.InferenceServerException, match="at most 8 texts"):
            server.embed_documents(["one more"])
        for question in ({"query": [""]}, {"documents": texts(8)}):
            assert json.loads(server.infer(**question, **asked)["model_info"][0])["dimension"] == 64
        assert slow.outcomes == [[]]
    assert [status(outcome) for outcome in slow.wait()] == ["OK"]
    counts = {
        f'nv_embed_requests_total{{kind="{kind}",outcome="ok"}}': n for kind, n in (("model_info", 2), ("documents", 1))
    }
    server.metrics_once(lambda metrics: counts.items() <= metrics.items())


@pytest.mark.slow
def test_queries_are_answered_beside_a_long_text_whose_work_ends_when_its_client_leaves(start_server):
    server = start_server()  # one core computes: who holds it holds the server
    long = "0 1 " * 40_000  # cut to 32,768 tokens, which take this core many seconds
    clients, num_queries = Clients(server, [[long]]), 0
    while not clients.outcomes[0]:
        started = time.monotonic()
        server.embed_query(f"question {num_queries}")
        assert time.monotonic() - started < 10
        num_queries += 1
    assert [status(outcome) for outcome in clients.wait()] == ["OK"]
    assert num_queries > 2
    with pytest.raises(triton.InferenceServerException) as caught:
        server.infer(documents=[f"another {long}"], timeout=2)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    eventually(lambda: server.metrics_now()["nv_embed_dropped_texts_total"] == 1)


# --- the server ends, to be restarted -------------------------------------------------------------------


@pytest.mark.parametrize("with_signal", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_answers_what_is_in_flight_and_ends_with_exit_code_0(start_server, with_signal):
    server = start_server()
    with server.held(texts(300)) as clients:
        server.process.send_signal(with_signal)
        eventually(lambda: not server.answers())
        assert clients.outcomes == [[]]
    assert [outcome.shape for outcome in clients.wait()] == [(301, 64)]
    assert server.process.wait(DEADLINE_SECONDS) == 0
    for words in ("Traceback", "Fatal Python error"):  # of the model's process, whose end Triton does not look at
        assert words not in server.log_text()


@pytest.mark.parametrize(("number", "message"), [(102, "DeviceLost"), (103, "the batcher broke")])
def test_a_lost_device_and_a_dead_thread_answer_everyone_unavailable_and_end_the_server(start_server, number, message):
    server = start_server(NV_EMBED_MAX_BATCH_TOKENS="300")
    others = [texts(100), texts(100, "two")]
    num_tokens = server.num_tokens([text for other in others for text in other])
    with server.held([fault(number)]) as first:
        clients = Clients(server, others)
        server.wait_for_waiting(num_tokens)
    assert {status(outcome) for outcome in first.wait() + clients.wait()} == {"UNAVAILABLE"}
    # It is asked by SIGTERM, and killed if that takes longer than the watchdog waits.
    assert server.process.wait(DEADLINE_SECONDS) in (0, -signal.SIGKILL)
    assert message in server.log_text()


@pytest.mark.parametrize(
    ("with_signal", "verdict"), [(signal.SIGKILL, "has died with exit code -9"), (signal.SIGSTOP, "has been silent")]
)
def test_a_killed_model_process_leaves_no_client_waiting(start_server, with_signal, verdict):
    server = start_server(NV_EMBED_MAX_BATCH_TOKENS="300")
    regions = shared_memory(model_pid(server))
    assert regions
    others = [texts(100), texts(100, "two")]
    num_tokens = server.num_tokens([text for other in others for text in other])
    with server.held() as first:
        clients = Clients(server, others)
        server.wait_for_waiting(num_tokens)  # Triton itself answers INTERNAL to what it is just handing over
        os.kill(model_pid(server), with_signal)
        assert {status(outcome) for outcome in first.wait() + clients.wait()} == {"UNAVAILABLE"}
    assert server.process.wait(DEADLINE_SECONDS) != 0
    assert f"nv-embed-v2 watchdog: the model's process {verdict}" in server.log_text()
    eventually(lambda: not any(region.exists() for region in regions))


def test_a_segmentation_fault_ends_the_server_and_restart_always_starts_it_again(start_server):
    server = start_server(RESTART="always")
    outcomes = Clients(server, [[fault(104)], ["waits"]]).wait()
    assert status(outcomes[0]) == "UNAVAILABLE"
    eventually(lambda: "supervise.sh: ended with exit code" in server.log_text())
    eventually(server.answers, START_SECONDS)
    assert server.embed_query("again").shape == (1, 64)
    for words in ("Segmentation fault", "_faulty_compute", "died with exit code -11"):
        assert words in server.log_text()
    assert server.stop() == 0


def test_a_server_that_hangs_in_its_handler_of_a_crash_is_killed_and_leaves_no_client_waiting(
    toy, tmp_path, faulty_repository
):
    log = tmp_path / "log"
    os.mkfifo(log)
    reader = os.open(log, os.O_RDWR | os.O_NONBLOCK)
    with FaultyServer(log, toy, faulty_repository) as server:
        others = texts(30)
        num_tokens = server.num_tokens(others)
        first, said = Clients(server, [[fault(108)]]), bytearray()

        def holds() -> bool:
            with suppress(BlockingIOError):
                said.extend(os.read(reader, 65536))
            return b"fault 108 waits" in said

        eventually(holds)  # texts that come before it would be computed instead of waiting
        clients = Clients(server, [others])
        server.wait_for_waiting(num_tokens)
        with suppress(BlockingIOError):  # the handler prints, and waits for ever when nobody reads a full pipe
            while True:
                os.write(reader, b"-")
        server.process.send_signal(signal.SIGSEGV)
        assert [status(outcome) for outcome in first.wait() + clients.wait()] == ["UNAVAILABLE"] * 2
        assert server.process.wait(DEADLINE_SECONDS) == -signal.SIGKILL
    os.close(reader)


def test_sigterm_with_more_work_than_there_is_time_answers_it_unavailable_and_ends_with_exit_code_0(start_server):
    server = start_server(NV_EMBED_MAX_BATCH_TOKENS="100")
    slow = [fault(109) + str(i) for i in range(30)]  # 3 s each
    num_tokens = server.num_tokens([*slow, *texts(1)])
    with server.held(slow) as first:
        other = Clients(server, [texts(1)])
        server.wait_for_waiting(num_tokens)
        server.process.terminate()
        eventually(lambda: not server.answers())
    (refused,), (answered,) = first.wait(), other.wait()
    assert (status(refused), status(answered)) == ("UNAVAILABLE", "OK")
    assert "within the time the server has to stop" in str(refused)
    assert server.process.wait(DEADLINE_SECONDS) == 0  # Triton's own exit timeout would have ended with 1


def test_sigterm_while_the_model_loads_leaves_no_process_and_no_memory_behind(toy, tmp_path, faulty_repository):
    repository = shutil.copytree(faulty_repository, tmp_path / "model_repository")
    with (repository / ENGINE).open("a", encoding="utf-8") as engine:
        engine.write("\n\ntime.sleep(600)\n")
    server = Server(tmp_path / "log.txt", toy, {"MODEL_REPOSITORY": str(repository)})
    try:
        watched = ["pgrep", "--full", rf"watchdog\.py [0-9]+ {server.process.pid} {MODEL_NAME}$"]
        eventually(lambda: subprocess.run(watched, capture_output=True, check=False).returncode == 0, START_SECONDS)
        pid = model_pid(server)
        regions = shared_memory(pid)
        assert regions
    finally:
        code = server.stop()
    assert code == -signal.SIGTERM
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    eventually(lambda: not any(region.exists() for region in regions))


def test_a_model_reloaded_and_unloaded_in_explicit_mode_serves_again(start_server):
    server = start_server(
        ["--model-control-mode=explicit", f"--load-model={MODEL_NAME}"],  # later arguments win
        ADMIN_KEY="sesame",
        NV_EMBED_MAX_BATCH_TOKENS="300",
    )
    key = {"triton-grpc-protocol-nv-embed-admin": "sesame"}

    def num_alive() -> int:
        log = server.log_text()
        return log.count("successfully loaded") - log.count("successfully unloaded")

    for change, num_left in ((server.client.load_model, 1), (server.client.unload_model, 0)):
        with ThreadPoolExecutor() as pool:
            with server.held(texts(100)) as clients:
                changed = pool.submit(change, MODEL_NAME, headers=key)
            assert {status(outcome) for outcome in clients.wait()} == {"OK"}  # by the model that was asked
            changed.result(DEADLINE_SECONDS)
        eventually(lambda num_left=num_left: num_alive() == num_left)  # the older one has taken down what it had
    server.client.load_model(MODEL_NAME, headers=key)
    assert server.embed_query("loaded again").shape == (1, 64)
    url = f"http://localhost:{server.http}/v2/models/{MODEL_NAME}/config"
    request = urllib.request.Request(url, headers={"nv-embed-admin": "sesame"})
    with urllib.request.urlopen(request, timeout=DEADLINE_SECONDS) as http:
        assert http.status == 200
    assert server.stop() == 0


def test_shared_memory_that_was_cleaned_up_still_serves_those_who_have_it_open(start_server):
    server = start_server()
    (region,) = shared_memory(model_pid(server))
    region.unlink()
    assert server.embed_documents([str(i) for i in range(5000)]).shape == (5000, 64)
    assert server.stop() == 0


@pytest.mark.server
def test_an_answer_that_shared_memory_cannot_hold_is_refused_and_the_next_is_served(toy, tmp_path):
    """In a mount namespace of its own, with a small /dev/shm."""
    probe = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs -o size=8m tmpfs /dev/shm"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a /dev/shm of its own needs privileges")
    script = f"""
import sys
sys.path[:0] = [{str(ROOT / "test")!r}, {str(ROOT / "benchmarks")!r}]
from pathlib import Path
import tritonclient.grpc as triton
from serving import Server
server = Server(Path({str(tmp_path / "log.txt")!r}), Path({str(toy)!r}), {{"SHM_BYTES": "2097152"}}).wait_until_ready()
assert server.embed_documents(["x"] * 1000).shape == (1000, 64)
try:
    server.embed_documents([str(i) for i in range(14_000)])
    print("answered")
except triton.InferenceServerException as error:
    print("refused", error.status(), error.message())
outcomes = ("ok", "InvalidRequest")
counted = [f'nv_embed_requests_total{{{{kind="documents",outcome="{{outcome}}"}}}}' for outcome in outcomes]
metrics = server.metrics_once(lambda metrics: all(metrics[name] for name in counted))
print([metrics[name] for name in counted])
print(server.embed_documents(["x"] * 1000).shape, server.stop())
"""
    command = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=5m tmpfs /dev/shm && exec "$0" -c "$1"']
    result = subprocess.run([*command, sys.executable, script], capture_output=True, text=True, check=True)
    assert "refused StatusCode.INVALID_ARGUMENT expected an answer of at most" in result.stdout
    assert "[1.0, 1.0]" in result.stdout
    assert "(1000, 64) 0" in result.stdout
