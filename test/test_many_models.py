"""Several models in one real Triton: each as if it were alone, and what one's end means for the others."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from serving import DEADLINE_SECONDS, MODEL_NAME, ROOT, Server, checkout, eventually
from test_faults import ENGINE, FAULTS, Clients, FaultyServer, fault, model_pid, status
from test_start import Gateway, descendants

pytestmark = pytest.mark.server
PROMPT = 'Ünïcode "q" \\ \n line: '


def add(repository: Path, name: str, folder: Path, *parameters: str) -> None:
    command = [repository / "tools" / "add_model", name, folder, "device=cpu", "dtype=float32", *parameters]
    subprocess.run(command, check=True, stdout=subprocess.PIPE)


# --- each as if it were alone ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(toy, mini, tmp_path_factory):
    """The toy as nv-embed-v2, nv-embed-mini as `mini`, and the toy as `odd`, in an odd folder and with odd settings."""
    repository = checkout(tmp_path_factory.mktemp("repository") / "copy")
    odd = shutil.copytree(toy, repository / "a 'toy' é 漢")
    add(repository, "mini", mini)
    add(repository, "odd", odd, f"query_prompt={PROMPT}", "max_request_documents=3", "cache_mebibytes=0")
    settings = {"NV_EMBED_MAX_REQUEST_DOCUMENTS": "5", "NV_EMBED_CACHE_MEBIBYTES": "0"}
    with Server(repository / "log.txt", toy, settings, command=[repository / "serve.sh"]) as server:
        yield server
        assert server.stop() == 0


def test_each_model_computes_with_its_checkpoint_and_prompt(server):
    documents = ["one document", "another document"]
    of_toy = server.infer(documents=documents)
    assert of_toy["embeddings"].shape == (2, 64)
    assert server.infer(documents=documents, model="mini")["embeddings"].shape == (2, 384)
    of_odd = server.infer(documents=documents, model="odd")
    np.testing.assert_allclose(of_odd["embeddings"], of_toy["embeddings"], atol=1e-6)
    with_prompt = server.infer(query=["a question"], parameters={"instruction": PROMPT})
    of_odd = server.infer(query=["a question"], model="odd")
    np.testing.assert_array_equal(of_odd["token_counts"], with_prompt["token_counts"])
    np.testing.assert_allclose(of_odd["embeddings"], with_prompt["embeddings"], atol=1e-6)
    assert not np.allclose(of_odd["embeddings"], server.embed_query("a question"), atol=0.01)


def test_variables_concern_one_model_and_files_the_others(server):
    for model, most in ((MODEL_NAME, 5), ("odd", 3)):
        with pytest.raises(triton.InferenceServerException, match=f"at most {most} documents"):
            server.infer(documents=["text"] * (most + 1), model=model)
    assert len(server.infer(documents=["text"] * 6, model="mini")["token_counts"]) == 6


def test_metrics_carry_the_models_name(server):
    query = 'nv_embed_requests_total{kind="query",outcome="ok"}'
    series = [{name for name in server.metrics_now(model) if "nv_embed_" in name} for model in ("mini", "odd")]
    assert series[0] == series[1] == {name for name in server.metrics_now() if "nv_embed_" in name}
    assert server.metrics_now("mini")[query] == 0  # asked by no other test
    server.infer(query=["a question"], model="mini")
    eventually(lambda: server.metrics_now("mini")[query] == 1)
    for _ in range(2):
        server.infer(query=["a question"], model="odd")
    eventually(lambda: server.metrics_now("odd")[query] >= 2)
    assert server.metrics_now("mini")[query] == 1


def test_models_load_one_after_the_other(server):
    events = re.findall(r"ModelInstanceInitialize: (\w[\w-]*)_0_0|successfully loaded \'([\w-]+)\'", server.log_text())
    begun, ended = events[::2], events[1::2]
    assert len(begun) == 3
    assert [name for name, _ in begun] == [name for _, name in ended]


def test_lines_of_the_log_say_of_which_model(server):
    for model in (MODEL_NAME, "mini", "odd"):
        assert f"{model}: ready: Settings(" in server.log_text()


# --- the model at MODEL_PATH is of another kind ---------------------------------------------------------


def test_another_kind_is_served_under_its_folders_name_beside_what_was_added(tmp_path, gateway_venv, start):
    repository = checkout(tmp_path / "copy", "client")
    folder = shutil.copytree(ROOT / "test" / "data" / "nemotron-toy", tmp_path / "nemotron-8b")
    add(repository, "added", folder)
    gateway = Gateway()
    settings = {"NV_EMBED_MAX_REQUEST_DOCUMENTS": "5", "RESTART": "always"} | gateway.settings(gateway_venv)
    server = start(tmp_path / "log.txt", folder, settings, command=[repository / "serve.sh"])
    for is_restarted in (False, True):
        if is_restarted:
            shutil.rmtree(repository / "model_repository" / "added")  # for the next start by hand
            (pid,) = (pid for pid, line in descendants(server.process.pid).items() if "/bin/tritonserver --" in line)
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: "starting again" in server.log_text())
            eventually(server.answers)
        rows = server.infer(documents=["a text"], model="nemotron-8b")["embeddings"]
        np.testing.assert_allclose(rows, server.infer(documents=["a text"], model="added")["embeddings"], atol=1e-6)
        with pytest.raises(triton.InferenceServerException, match="at most 5 documents"):
            server.infer(documents=["text"] * 6, model="nemotron-8b")
        with pytest.raises(triton.InferenceServerException, match="unknown model"):
            server.infer(documents=["text"], model=MODEL_NAME)
        eventually(gateway.answers)
        for model in ("nemotron-8b", "added"):
            np.testing.assert_allclose(gateway.embed(["a text"], f"{model}-passage"), rows, atol=1e-5)
    assert server.stop() == 0


# --- what one's end means for the others ----------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty_repository(toy, tmp_path_factory):
    repository = checkout(tmp_path_factory.mktemp("faulty") / "copy")
    with (repository / "model_repository" / ENGINE).open("a", encoding="utf-8") as engine:
        engine.write(FAULTS)
    add(repository, "second", toy, "cache_mebibytes=0")
    return repository / "model_repository"


@pytest.fixture
def faulty_server(toy, tmp_path, faulty_repository):
    with FaultyServer(tmp_path / "log.txt", toy, faulty_repository) as server:
        yield server


LONG = [f"{fault(109)} {i}" for i in range(3)]  # 3 s each: longer than a server has to end if no answer is owed


def wait_until_counted(server: Server, model: str) -> None:
    """Return when a request that a model refuses stands in its metrics, which come a moment later."""
    with pytest.raises(triton.InferenceServerException, match="truncate"):
        server.infer(query=[""], parameters={"truncate": "no"}, model=model)
    eventually(lambda: server.metrics_now(model)['nv_embed_requests_total{kind="unknown",outcome="InvalidRequest"}'])


def test_a_stop_answers_what_every_model_has_begun(faulty_server):
    with faulty_server.held() as first, faulty_server.held(model="second") as second:
        for model in (MODEL_NAME, "second"):
            wait_until_counted(faulty_server, model)  # by then the watchdog has seen that the server serves
        faulty_server.process.terminate()
        says = "{}: the server stops; requests not yet answered: 1"
        eventually(lambda: all(says.format(name) in faulty_server.log_text() for name in (MODEL_NAME, "second")))
    assert [status(outcome) for outcome in first.wait() + second.wait()] == ["OK", "OK"]
    assert faulty_server.process.wait(DEADLINE_SECONDS) == 0


@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGSTOP])
def test_when_one_models_process_dies_or_freezes_the_others_answer_what_they_have(faulty_server, with_signal):
    with faulty_server.held(model="second") as lost:
        kept = Clients(faulty_server, [LONG])
        eventually(lambda: faulty_server.log_text().count("fault 109") == 1)
        os.kill(model_pid(faulty_server, "second"), with_signal)
        assert [status(outcome) for outcome in kept.wait()] == ["OK"]
        assert [status(outcome) for outcome in lost.wait()] == ["UNAVAILABLE"]
    assert faulty_server.process.wait(DEADLINE_SECONDS) != 0
    assert "second watchdog: the model's process has" in faulty_server.log_text()
    assert f"{MODEL_NAME} watchdog" not in faulty_server.log_text()


def test_when_one_models_device_is_lost_the_others_answer_what_they_have(faulty_server):
    kept = Clients(faulty_server, [LONG])
    eventually(lambda: faulty_server.log_text().count("fault 109") == 1)
    lost = Clients(faulty_server, [[fault(102)]], "second")
    assert [status(outcome) for outcome in lost.wait()] == ["UNAVAILABLE"]
    assert [status(outcome) for outcome in kept.wait()] == ["OK"]
    assert faulty_server.process.wait(DEADLINE_SECONDS) in (0, -signal.SIGKILL)


def test_a_model_that_refuses_its_settings_is_named_and_none_is_left(toy, tmp_path):
    repository = checkout(tmp_path / "copy")
    add(repository, "added", toy)
    config = repository / "model_repository" / "added" / "config.pbtxt"
    config.write_text(config.read_text(encoding="utf-8").replace(str(toy), "/absent"), encoding="utf-8")
    server = Server(tmp_path / "log.txt", toy, command=[repository / "serve.sh"])
    assert server.process.wait(DEADLINE_SECONDS) == 1
    assert re.search(r"failed to load 'added' .* the server does not start: model_path: .*'/absent'", server.log_text())
    left = ["pgrep", "--full", f"triton_python_backend_stub {repository}"]
    eventually(lambda: subprocess.run(left, capture_output=True, check=False).returncode == 1)
