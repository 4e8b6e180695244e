"""serve.sh on real servers: with the gateway beside them, in folders of any name, and for another user."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from serving import ROOT, checkout, eventually, free_ports

SECONDS = 600  # for what takes some seconds on a quiet machine
WITH_GATEWAY = ROOT / "tools" / "with_gateway.py"


@dataclass(frozen=True)
class Gateway:
    """The OpenAI-style API at a port of this machine."""

    key: str = "sesame"
    port: int = field(default_factory=lambda: free_ports(1)[0])

    def settings(self, venv: Path) -> dict[str, str]:
        """What makes serve.sh start it."""
        return {"GATEWAY_PORT": str(self.port), "GATEWAY_API_KEY": self.key, "GATEWAY_VENV": str(venv)}

    def answers(self) -> bool:
        try:
            return self.embed(["ready?"], None).shape[0] == 1
        except OSError:
            return False

    def embed(self, texts: list[str], model: str | None = "nv-embed-v2") -> np.ndarray:
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.key}"}
        body = json.dumps({"model": model, "input": texts}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/embeddings", body, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return np.array([item["embedding"] for item in json.load(response)["data"]], dtype=np.float32)


def descendants(pid: int) -> dict[int, str]:
    """Command lines of all processes below one, by process."""
    found = {}
    for child in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split():
        try:
            found[int(child)] = (
                Path(f"/proc/{child}/cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ")
            )
        except (FileNotFoundError, ProcessLookupError):
            continue
        found |= descendants(int(child))
    return found


# --- the gateway beside the server ----------------------------------------------------------------------


def test_the_gateway_serves_beside_the_server_is_started_again_alone_and_stops_with_it(
    toy, tmp_path, gateway_venv, start
):
    gateway = Gateway()
    # A proxy that is none: the gateway may not ask it for the server.
    proxy = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "example.com"}
    settings = gateway.settings(gateway_venv) | proxy | {"RESTART": "always"}
    server = start(tmp_path / "log.txt", toy, settings)
    eventually(gateway.answers)
    assert f"http://127.0.0.1:{gateway.port}/v1" in server.log_text()
    assert f"a page to try it:  http://127.0.0.1:{gateway.port}/\n" in server.log_text()
    eventually(lambda: f"; try it at http://127.0.0.1:{gateway.port}/\n" in server.log_text())
    np.testing.assert_allclose(gateway.embed(["a", "b"]), server.embed_documents(["a", "b"]), atol=1e-5)
    with pytest.raises(urllib.error.HTTPError, match="401") as refused:
        dataclasses.replace(gateway, key="guess").embed(["a"])
    refused.value.close()

    (pid,) = (
        pid
        for pid, command in descendants(server.process.pid).items()
        if "nv_embed_client" in command and "supervise.sh" not in command
    )
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: "supervise.sh: ended with exit code 137" in server.log_text())
    eventually(gateway.answers)
    assert server.answers()

    processes = descendants(server.process.pid)
    assert server.stop() == 0
    assert not gateway.answers()
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists() and "watchdog" not in processes[pid]]


@pytest.fixture
def both(tmp_path):
    """Runs with_gateway.py on two scripts, given as Python; `started` waits until both have said so."""
    head = "import pathlib, signal, sys, time; pathlib.Path(sys.argv[1]).touch()\n"

    def run(gateway: str, server: str) -> subprocess.Popen:
        commands = [
            [sys.executable, "-c", head + script, str(tmp_path / name)]
            for name, script in (("gateway", gateway), ("server", server))
        ]
        command = [sys.executable, str(WITH_GATEWAY), str(len(commands[0])), *commands[0], *commands[1]]
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    return run


pytestmark = pytest.mark.server
SLEEP = "time.sleep(600)"
END_WITH = "signal.signal(signal.SIGTERM, lambda *_: sys.exit({})); pathlib.Path(sys.argv[1] + '-on').touch(); " + SLEEP


@pytest.mark.parametrize(
    ("gateway", "server", "code", "message"),
    [
        (SLEEP, "sys.exit(7)", 7, ""),
        (SLEEP, "sys.exit(0)", 0, ""),
        (SLEEP, "import os; os.kill(os.getpid(), 11)", 139, ""),
        ("sys.exit(2)", SLEEP, 2, "The gateway ended with exit code 2; stopping the server"),
        ("sys.exit(0)", SLEEP, 1, "The gateway ended with exit code 0; stopping the server"),
    ],
)
def test_when_one_ends_the_other_is_ended_and_the_exit_code_is_of_who_ended_first(both, gateway, server, code, message):
    process = both(gateway, server)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == code
    assert errors.strip() == message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_on_a_signal_the_gateway_ends_before_the_server_is_told_and_the_exit_code_is_the_servers(
    both, tmp_path, number
):
    says_when = "signal.signal(signal.SIGTERM, lambda *_: (print({!r}, flush=True), sys.exit({})))\n"
    ready = "pathlib.Path(sys.argv[1] + '-on').touch(); " + SLEEP
    process = both(says_when.format("gateway", 5) + ready, says_when.format("server", 3) + ready)
    eventually(lambda: (tmp_path / "gateway-on").exists() and (tmp_path / "server-on").exists())
    process.send_signal(number)
    said, _ = process.communicate(timeout=SECONDS)
    assert said.split() == ["gateway", "server"]
    assert process.returncode == 3


def test_a_gateway_that_does_not_end_is_killed_after_its_server(both, tmp_path):
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN); pathlib.Path(sys.argv[1] + '-on').touch(); " + SLEEP
    process = both(stubborn, END_WITH.format(0))
    eventually(lambda: (tmp_path / "gateway-on").exists() and (tmp_path / "server-on").exists())
    process.terminate()
    assert process.communicate(timeout=SECONDS) == ("", "")
    assert process.returncode == 0


def test_who_refuses_its_settings_is_not_started_again():
    command = [ROOT / "tools" / "supervise.sh", "bash", "-c", "echo refused; exit 2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert (done.returncode, done.stdout) == (2, "refused\n")


# --- folders of any name --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        b"a b [c] 'd' \"e\" $HOME & ; \\ * ? ` ( ) < > | # ~ % = , \n \xc3\xa9 \xe6\xbc\xa2",
        b"not UTF-8 \xff",
    ],
)
def test_repository_environment_and_checkpoint_may_be_in_a_folder_of_any_name(toy, tmp_path, gateway_venv, start, name):
    folder = tmp_path / os.fsdecode(name)
    repository = folder / "repository"
    checkout(repository, "client")
    checkpoint = shutil.copytree(toy, folder / "checkpoint")
    for link, venv in (("venv", os.environ.get("VENV", ROOT / ".venv")), ("gateway", gateway_venv)):
        (folder / link).symlink_to(venv)
    gateway = Gateway()
    settings = {
        **gateway.settings(folder / "gateway"),
        "VENV": "venv",  # counts from the folder that serve.sh is called from
        "RESTART": "always",  # the second server has to find the folders, too
    }
    server = start(folder / "log.txt", checkpoint, settings, command=[repository / "serve.sh"])
    eventually(gateway.answers)
    rows = server.embed_documents(["of any name"])
    np.testing.assert_allclose(gateway.embed(["of any name"]), rows, atol=1e-5)
    (pid,) = (pid for pid, command in descendants(server.process.pid).items() if "/bin/tritonserver --" in command)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: server.answers() and gateway.answers())
    np.testing.assert_allclose(server.embed_documents(["of any name"]), rows, atol=1e-6)
    assert server.stop() == 0


# --- another user ---------------------------------------------------------------------------------------

AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", "HOME=/nonexistent"]


def python_for_everybody() -> str | None:
    """A Python of this environment's version with which another user could run the server."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (f"/usr/bin/{name}", f"/usr/local/bin/{name}", os.path.realpath(sys.executable)):
        checks = '"$0" -c "import ensurepip" && "$0" "$1" --check-only'
        command = [*AS_NOBODY, "sh", "-c", checks, candidate, ROOT / "tools" / "pip_triton.py"]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return candidate
    return None


@pytest.fixture
def public_folder():
    """A folder that every user can enter: pytest's own is for its user alone."""
    folder = Path(tempfile.mkdtemp(prefix="nv-embed-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="becoming another user takes root")
def test_an_environment_made_by_root_serves_another_user_who_can_write_nowhere(toy, public_folder, start):
    python = python_for_everybody()
    if python is None:
        pytest.skip("no Python here that another user could run with Triton")
    repository, venv = public_folder / "repository", public_folder / "venv"
    checkout(repository)
    checkpoint = shutil.copytree(toy, public_folder / "checkpoint")
    requirements = [repository / "model_repository/nv-embed-v2/requirements.txt", repository / "tools/requirements.txt"]

    def prepare(*files, as_user=()) -> subprocess.CompletedProcess:
        script = 'umask 077; source "$0" && prepare_venv "$@"'
        command = [*as_user, "bash", "-c", script, repository / "tools/prepare_venv.sh", venv, *files]
        environ = os.environ | {"PYTHON": python, "TORCH_CPU_INDEX": "file:///absent"}
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=900)

    # The packages are those of the environment that runs this test: pip finds them and has nothing to install.
    (public_folder / "nothing.txt").touch()
    assert prepare(public_folder / "nothing.txt").returncode == 0
    (site,) = venv.glob("lib/python3*/site-packages")
    packages = next(Path(path) for path in sys.path if (Path(path) / "pytriton").is_dir())
    (site / "others.pth").write_text(f"{packages}\n", encoding="utf-8")
    early = prepare(*requirements, as_user=AS_NOBODY)
    assert early.returncode == 2
    assert f"{venv}: expected an environment ready for use or a folder that this user can write to" in early.stderr
    done = prepare(*requirements)
    assert done.returncode == 0, done.stderr

    (public_folder / "log").mkdir()
    command = [*AS_NOBODY, repository / "serve.sh"]
    server = start(public_folder / "log" / "log.txt", checkpoint, {"VENV": str(venv)}, command=command)
    status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="ascii")
    assert "Uid:\t65534\t65534" in status
    assert server.embed_query("for everybody").shape == (1, 64)
    assert server.stop() == 0
