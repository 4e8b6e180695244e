"""Faults on a real tritonserver: every request gets one answer, and the server goes on or ends to be restarted."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from nv_embed.watchdog import shared_memory
from serving import MODEL_NAME, ROOT, Server, bytes_input

ANSWER_SECONDS = 20  # every client has its answer by then

# Appended to the served engine.py: texts with a given number of <s> in them break the engine in a given way.
FAULTS = """

_start = Engine.start


def _faulty_start(self, sequences):
    import os, signal, sys

    for sequence in sequences:
        fault = int((sequence.input_ids == 1).sum()) - 1
        if fault == 101:
            raise RuntimeError("a kernel failed")
        if fault == 102:
            raise DeviceLost("cpu failed")
        if fault == 103:
            raise SystemExit("the thread dies")
        if fault == 104:
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == 105 and len(sequences) > 1 or fault == 106:
            raise OutOfDeviceMemory("the batch does not fit in the memory of cpu")
        if fault == 108:
            print("fault 108 sleeps", file=sys.stderr, flush=True)
            time.sleep(3)
    rows, seconds = _start(self, sequences)()
    rows = rows.copy()
    for row, sequence in zip(rows, sequences):
        if int((sequence.input_ids == 1).sum()) - 1 == 107:
            row[3] = float("nan")
    return lambda: (rows, seconds)


Engine.start = _faulty_start
"""


def fault(number: int) -> str:
    """A text with so many <s> in it."""
    return "<s>" * number


@pytest.fixture(scope="module")
def faulty_repository(tmp_path_factory) -> Path:
    repository = tmp_path_factory.mktemp("repository") / "model_repository"
    shutil.copytree(ROOT / "model_repository", repository)
    with (repository / "nv-embed-v2" / "1" / "nv_embed" / "compute" / "engine.py").open(
        "a", encoding="utf-8"
    ) as engine:
        engine.write(FAULTS)
    return repository


@pytest.fixture(scope="module")
def faulty_settings(faulty_repository):
    # One core computes one batch at a time: whoever holds it holds the server.
    return {"MODEL_REPOSITORY": str(faulty_repository), "NV_EMBED_CACHE_MEBIBYTES": "0", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(toy, tmp_path, faulty_settings):
    """Starts servers that can be broken; whatever is left of them at the end is killed."""
    servers = []

    def start(**environ) -> Server:
        servers.append(Server(tmp_path / f"log-{len(servers)}.txt", toy, faulty_settings | environ))
        return servers[-1].wait_until_ready()

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="module")
def faulty_server(toy, tmp_path_factory, faulty_settings):
    """One that survives what is done to it."""
    server = Server(tmp_path_factory.mktemp("server") / "log.txt", toy, faulty_settings)
    yield server.wait_until_ready()
    assert server.stop() == 0


def model_pid(server: Server) -> int:
    """Of the process that runs model.py."""
    command = ["pgrep", "--parent", str(server.process.pid), "--full", "triton_python_backend_stub"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Clients:
    """Requests in flight, each in a thread with a client of its own; what each got, and when."""

    def __init__(self, server: Server, requests: list[list[str]]) -> None:
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
                outcomes.append(client.infer(MODEL_NAME, [bytes_input("documents", texts)]).as_numpy("embeddings"))
            except triton.InferenceServerException as error:
                outcomes.append(error)

    def wait(self, seconds: float = ANSWER_SECONDS) -> list:
        """One outcome for each request, within the time that an answer may take."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))
        assert [len(outcomes) for outcomes in self.outcomes] == [1] * len(self.outcomes)
        return [outcomes[0] for outcomes in self.outcomes]


def texts(count: int) -> list[str]:
    return [f"words of a document, its number {i} among others of its kind" for i in range(count)]


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
    slow = Clients(faulty_server, [[fault(108)]])
    wait_until(lambda: "fault 108 sleeps" in faulty_server.log_text())
    tensor = {"name": "query", "shape": [1], "datatype": "BYTES", "data": ["late"]}
    code, answer = faulty_server.post({"inputs": [tensor], "parameters": {"timeout": 100_000}})
    assert (code, "within the request's timeout of 100 ms; got none in" in answer["error"]) == (503, True)
    with pytest.raises(triton.InferenceServerException, match="timeout of 100 ms; got none in") as caught:
        faulty_server.client.infer(MODEL_NAME, [bytes_input("query", ["late"])], timeout=100_000)
    assert caught.value.status() == "StatusCode.UNAVAILABLE"
    assert [status(outcome) for outcome in slow.wait()] == ["OK"]


# --- the server ends, to be restarted -------------------------------------------------------------------


@pytest.mark.parametrize(("number", "message"), [(102, "DeviceLost"), (103, "a thread of the batcher died")])
def test_a_lost_device_and_a_dead_thread_answer_everyone_unavailable_and_end_the_server(start, number, message):
    server = start(NV_EMBED_MAX_BATCH_TOKENS="300")
    clients = Clients(server, [[fault(108), fault(number)], texts(2000), texts(2000)])
    assert {status(outcome) for outcome in clients.wait()} == {"UNAVAILABLE"}
    assert server.process.wait(ANSWER_SECONDS) == 0  # asked for by SIGTERM
    assert message in server.log_text()


def test_a_killed_model_process_leaves_no_client_waiting(start):
    for with_signal, verdict in ((signal.SIGKILL, "has died with exit code -9"), (signal.SIGSTOP, "has been silent")):
        server = start(NV_EMBED_MAX_BATCH_TOKENS="300")
        regions = shared_memory(model_pid(server))
        assert regions
        clients = Clients(server, [[fault(108)], texts(3000), texts(3000)])
        wait_until(lambda server=server: "fault 108 sleeps" in server.log_text())
        time.sleep(1)  # for the others to arrive: Triton itself answers INTERNAL to what it is just handing over
        os.kill(model_pid(server), with_signal)
        assert {status(outcome) for outcome in clients.wait()} == {"UNAVAILABLE"}
        assert server.process.wait(ANSWER_SECONDS) != 0
        assert f"nv-embed-v2 watchdog: the model's process {verdict}" in server.log_text()
        wait_until(lambda regions=regions: not any(region.exists() for region in regions))


def test_a_segmentation_fault_ends_the_server_and_restart_always_starts_it_again(start):
    server = start(RESTART="always")
    outcomes = Clients(server, [[fault(104)], ["waits"]]).wait()
    assert status(outcomes[0]) == "UNAVAILABLE"
    wait_until(server.answers)
    assert server.embed_query("again").shape == (1, 64)
    for words in ("Segmentation fault", "_faulty_start", "died with exit code -11", "supervise.sh: ended with exit"):
        assert words in server.log_text()
    assert server.stop() == 0


def test_a_server_that_hangs_in_its_handler_of_a_crash_is_killed_and_leaves_no_client_waiting(
    toy, tmp_path, faulty_settings
):
    log = tmp_path / "log"
    os.mkfifo(log)
    reader = os.open(log, os.O_RDWR | os.O_NONBLOCK)
    server = Server(log, toy, faulty_settings | {"NV_EMBED_MAX_BATCH_TOKENS": "300"}).wait_until_ready()
    clients = Clients(server, [[fault(108) + str(i) for i in range(20)]])  # 3 s for each
    time.sleep(1)  # for it to arrive
    with suppress(BlockingIOError):  # the handler prints, and waits for ever when nobody reads a full pipe
        while True:
            os.write(reader, b"-")
    try:
        server.process.send_signal(signal.SIGSEGV)
        assert [status(outcome) for outcome in clients.wait()] == ["UNAVAILABLE"]
        assert server.process.wait(ANSWER_SECONDS) == -signal.SIGKILL
    finally:
        server.process.kill()
        os.close(reader)


def test_sigterm_with_more_work_than_there_is_time_answers_it_unavailable_and_ends_with_exit_code_0(start):
    server = start(NV_EMBED_MAX_BATCH_TOKENS="100")
    clients = Clients(server, [[fault(108) + str(i) for i in range(30)], texts(1)])  # 3 s for each text of the first
    wait_until(lambda: "fault 108 sleeps" in server.log_text())
    time.sleep(1)  # of the 3 s, for the other to arrive
    server.process.terminate()
    outcomes = clients.wait(seconds=26)
    assert [status(outcome) for outcome in outcomes] == ["UNAVAILABLE", "OK"]
    assert "within the time the server has to stop" in str(outcomes[0])
    assert server.process.wait(ANSWER_SECONDS) == 0  # Triton's own exit timeout would have ended with 1


def test_sigterm_while_the_model_loads_leaves_no_process_and_no_memory_behind(toy, tmp_path, faulty_repository):
    repository = shutil.copytree(faulty_repository, tmp_path / "model_repository")
    with (repository / "nv-embed-v2" / "1" / "nv_embed" / "compute" / "engine.py").open(
        "a", encoding="utf-8"
    ) as engine:
        engine.write("\n\ntime.sleep(30)\n")
    server = Server(tmp_path / "log.txt", toy, {"MODEL_REPOSITORY": str(repository)})
    watched = ["pgrep", "--full", rf"watchdog\.py [0-9]+ {server.process.pid}$"]
    wait_until(lambda: subprocess.run(watched, capture_output=True, check=False).returncode == 0)
    pid = model_pid(server)
    regions = shared_memory(pid)
    assert regions
    server.process.terminate()
    assert server.process.wait(ANSWER_SECONDS) == -signal.SIGTERM
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    wait_until(lambda: not any(region.exists() for region in regions))


def test_a_model_reloaded_and_unloaded_in_explicit_mode_serves_again(toy, tmp_path):
    server = Server(
        tmp_path / "log.txt",
        toy,
        {
            "ADMIN_KEY": "sesame",
            "NV_EMBED_MAX_BATCH_TOKENS": "300",
            "NV_EMBED_CACHE_MEBIBYTES": "0",
            "OMP_NUM_THREADS": "1",
        },
        arguments=["--model-control-mode=explicit", f"--load-model={MODEL_NAME}"],  # later arguments win
    ).wait_until_ready()
    key = {"triton-grpc-protocol-nv-embed-admin": "sesame"}
    for change in (server.client.load_model, server.client.unload_model):
        clients = Clients(server, [texts(3000), [f"{text}, again" for text in texts(3000)]])
        wait_until(lambda: server.metrics_by_name()["nv_embed_queue_tokens"] > 0)
        change(MODEL_NAME, headers=key)
        assert {status(outcome) for outcome in clients.wait()} == {"OK"}  # by the model that was asked
    server.client.load_model(MODEL_NAME, headers=key)
    assert server.embed_query("loaded again").shape == (1, 64)
    url = f"http://localhost:{server.http}/v2/models/{MODEL_NAME}/config"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"nv-embed-admin": "sesame"}), timeout=30) as http:
        assert http.status == 200
    assert server.stop() == 0


def test_shared_memory_that_was_cleaned_up_still_serves_those_who_have_it_open(start):
    server = start()
    (region,) = shared_memory(model_pid(server))
    region.unlink()
    assert server.embed_documents([str(i) for i in range(5000)]).shape == (5000, 64)
    assert server.stop() == 0


def test_an_answer_that_shared_memory_cannot_hold_is_refused_and_the_next_is_served(toy, tmp_path):
    """In a mount namespace of its own, with a small /dev/shm."""
    probe = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs -o size=8m tmpfs /dev/shm"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a /dev/shm of its own needs privileges")
    script = f"""
import sys
sys.path[:0] = [{str(ROOT / "test")!r}, {str(ROOT / "model_repository" / "nv-embed-v2" / "1")!r}]
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
metrics = server.metrics_by_name()
print({{outcome: metrics[f'nv_embed_requests_total{{{{kind="documents",outcome="{{outcome}}"}}}}'] for outcome in
       ("ok", "InvalidRequest")}})
print(server.embed_documents(["x"] * 1000).shape, server.stop())
"""
    command = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=5m tmpfs /dev/shm && exec "$0" -c "$1"']
    result = subprocess.run([*command, sys.executable, script], capture_output=True, text=True, check=True)
    assert "refused StatusCode.INVALID_ARGUMENT expected an answer of at most" in result.stdout
    assert "{'ok': 1.0, 'InvalidRequest': 1.0}" in result.stdout
    assert "(1000, 64) 0" in result.stdout
