"""What serve.sh decides and refuses by itself, before any model is loaded."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from serving import SETTINGS, free_ports

REPO = Path(__file__).resolve().parent.parent
SERVE = REPO / "serve.sh"
# Writes its name and arguments as one JSON line, like the programs it stands for would receive them.
RECORDER = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["RECORD"], "a", encoding="utf-8") as record:
    record.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "a model"
    folder.mkdir()
    return folder


@pytest.fixture
def serve(tmp_path, model):
    """Runs serve.sh with the given settings; a `venv` that must not be touched unless a test is about it."""
    http, grpc, metrics = free_ports(3)

    def run(*arguments, cwd=tmp_path, script=SERVE, programs=(), **settings):
        tools = tmp_path / "bin"
        tools.mkdir(exist_ok=True)
        for program in programs:
            (tools / program).write_text(RECORDER)
            (tools / program).chmod(0o755)
        kept = {k: v for k, v in os.environ.items() if not k.startswith((*SETTINGS, "MALLOC_ARENA_MAX", "PYTHON"))}
        defaults = {
            "MODEL_PATH": str(model),
            "DEVICE": "cpu",
            "VENV": str(tmp_path / "venv"),
            "HTTP_PORT": str(http),
            "GRPC_PORT": str(grpc),
            "METRICS_PORT": str(metrics),
            "RECORD": str(tmp_path / "record"),
            "PATH": f"{tools}:{os.environ['PATH']}",
        }
        environment = {**kept, **defaults, **{name: str(value) for name, value in settings.items()}}
        return subprocess.run(
            [script, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120
        )

    return run


@pytest.fixture
def recorded(tmp_path):
    """The commands that recorders were started with, oldest first."""
    return lambda: [json.loads(line) for line in (tmp_path / "record").read_text(encoding="utf-8").splitlines()]


def assert_refused(done, *parts):
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    for part in parts:
        assert part in done.stderr


def values(command, option):
    return [after for before, after in pairwise(command) if before == option]


def test_an_unknown_runtime_is_refused_with_the_known_ones(serve):
    assert_refused(serve(RUNTIME="podman"), "RUNTIME", "auto, native, docker or pip", "'podman'")


@pytest.mark.parametrize("setting", ["MODEL_PATH", "MODEL_REPOSITORY"])
def test_a_folder_that_is_not_there_is_refused_by_its_settings_name(serve, setting):
    assert_refused(serve(**{setting: "/absent/folder"}), f"{setting}: expected", "'/absent/folder'")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_names_every_variable_with_its_default_and_starts_nothing(serve, tmp_path, option):
    done = serve(option, programs=["tritonserver"])
    assert done.returncode == 0
    settings = (REPO / "docs" / "settings.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([A-Z_]+)`", settings, re.M))
    assert named == set(re.findall(r"^([A-Z_]+)=", done.stdout, re.M))
    assert "HTTP_PORT=8000 " in done.stdout
    assert "Arguments go to tritonserver" in done.stdout
    assert "}" not in done.stdout
    assert not (tmp_path / "record").exists()


@pytest.mark.parametrize("setting", ["ADDRESS", "METRICS_ADDRESS"])
@pytest.mark.parametrize("address", ["8001", "embeddings.example.com", "::1", "[::1]"])
def test_what_is_no_ipv4_address_is_refused_before_anything_is_started(serve, tmp_path, setting, address):
    done = serve(programs=["tritonserver"], RUNTIME="native", **{setting: address})
    assert_refused(done, f"{setting}: expected an IPv4 address of this machine", f"got '{address}'")
    assert not (tmp_path / "record").exists()


@pytest.mark.parametrize("setting", ["HTTP_PORT", "GRPC_PORT", "METRICS_PORT"])
@pytest.mark.parametrize("runtime", ["pip", "docker", "native"])
def test_a_port_in_use_is_said_before_anything_is_installed_or_started(serve, tmp_path, setting, runtime):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = serve(programs=["docker", "tritonserver"], RUNTIME=runtime, **{setting: port})
    assert_refused(done, f"{setting}: port {port} is already in use", f"set {setting} to a free port")
    assert not (tmp_path / "venv").exists()
    assert not (tmp_path / "record").exists()


def test_ports_that_are_no_numbers_or_given_twice_are_refused(serve):
    assert_refused(serve(HTTP_PORT="eight"), "HTTP_PORT: expected a port number, got 'eight'")
    assert_refused(serve(GRPC_PORT=65536), "GRPC_PORT: expected a port number, got '65536'")
    (port,) = free_ports(1)
    assert_refused(serve(GRPC_PORT=port, METRICS_PORT=port), f"METRICS_PORT: port {port} is given twice")


@pytest.mark.skipif(
    Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None, reason="this machine has a GPU"
)
def test_a_gpu_that_is_not_there_is_said_before_anything_is_installed(serve, tmp_path):
    assert_refused(serve(RUNTIME="pip", DEVICE="cuda:0"), "DEVICE=cuda:0", "found none", "DEVICE=cpu")
    assert not (tmp_path / "venv").exists()


def test_auto_takes_the_tritonserver_on_the_path_and_the_users_arguments_come_last(serve, recorded, model):
    done = serve("--log-verbose=1", "a b", programs=["tritonserver", "docker"])
    assert done.returncode == 0, done.stderr
    (command,) = recorded()
    assert command[0] == "tritonserver"
    assert command[-2:] == ["--log-verbose=1", "a b"]
    assert f"--model-repository={REPO}/model_repository" in command
    for setting in ("--model-control-mode=none", "--disable-auto-complete-config", "--http-address=0.0.0.0"):
        assert setting in command


def test_a_relative_model_path_counts_from_the_callers_folder_and_a_link_to_the_script_works(
    serve, recorded, tmp_path, model
):
    (tmp_path / "link").symlink_to(SERVE)
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    done = serve(
        cwd=elsewhere, script="../link", programs=["docker"], RUNTIME="docker", IMAGE="i", MODEL_PATH="../a model"
    )
    assert done.returncode == 0, done.stderr
    mounts = values(recorded()[0], "--mount")
    assert f"type=bind,source={REPO}/model_repository,target=/model_repository,readonly" in mounts
    (of_model,) = (mount for mount in mounts if "NV-Embed" in mount)
    source = of_model.removeprefix("type=bind,source=").removesuffix(",target=/models/NV-Embed-v2,readonly")
    assert Path(source).samefile(model)


def test_without_a_model_path_it_says_what_it_serves_and_how_to_serve_the_real_model(serve):
    done = serve(MODEL_PATH="", DEVICE="", RUNTIME="stop here")
    assert "small checkpoint" in done.stderr
    assert "on cpu" in done.stderr
    assert f"MODEL_PATH=/path/to/NV-Embed-v2 {SERVE}" in done.stderr


def test_docker_builds_the_image_and_runs_the_mounted_repository_on_the_gpu(serve, recorded, tmp_path, model):
    done = serve(
        "--log-verbose=1",
        programs=["docker"],
        RUNTIME="docker",
        DEVICE="cuda:0",
        ADDRESS="localhost",
        HTTP_PORT=18100,
        GRPC_PORT=18101,
        METRICS_PORT=18102,
        SHM_SIZE="2g",
        NV_EMBED_MAX_BATCH_TOKENS=1000,
        OMP_NUM_THREADS=4,
        CUDA_VISIBLE_DEVICES="2,3",
    )
    assert done.returncode == 0, done.stderr
    build, run = recorded()
    assert build == ["docker", "build", "--tag", "nv-embed-triton", str(REPO)]
    assert run[:3] == ["docker", "run", "--rm"]
    assert "--init" not in run  # the image has one
    assert "--shm-size=2g" in run
    assert values(run, "--stop-timeout") == ["40"]
    assert values(run, "--ulimit") == ["memlock=-1"]
    assert values(run, "--gpus") == ["all"]
    assert values(run, "--publish") == [f"127.0.0.1:1810{i}:800{i}" for i in range(3)]
    settings = {"NV_EMBED_DEVICE", "NV_EMBED_MAX_BATCH_TOKENS", "NV_EMBED_MODEL_PATH"}
    assert settings | {"MALLOC_ARENA_MAX", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"} <= set(values(run, "--env"))
    assert all(mount.endswith(",readonly") for mount in values(run, "--mount"))
    image = run.index("nv-embed-triton")
    assert run[image + 1 : image + 3] == ["tritonserver", "--model-repository=/model_repository"]
    assert run[-1] == "--log-verbose=1"
    assert not any(argument.startswith("--http-port") for argument in run[image:])  # inside, the ports are the usual


@pytest.mark.parametrize("device", ["cuda:0", "cpu,cuda:0"])
def test_with_a_gpu_it_takes_docker_and_says_so_if_that_does_not_work(serve, recorded, tmp_path, device):
    done = serve(programs=["docker", "nvidia-smi"], DEVICE=device, IMAGE="i")
    assert done.returncode == 0, done.stderr
    assert [command[:2] for command in recorded() if command[0] == "docker"] == [["docker", "info"], ["docker", "run"]]
    (tmp_path / "bin" / "docker").write_text("#!/bin/sh\nexit 1\n")
    done = serve(programs=["nvidia-smi"], DEVICE=device, HTTP_PORT="refused, before anything is installed")
    assert f"RUNTIME=pip, an older Triton: expected Docker for {device}, but 'docker info' fails." in done.stderr


def test_docker_on_the_cpu_asks_for_no_gpu_and_a_given_image_is_not_built(serve, recorded):
    assert serve(programs=["docker"], RUNTIME="docker", IMAGE="registry/triton:1").returncode == 0
    (run,) = recorded()
    assert "--gpus" not in run
    assert "registry/triton:1" in run
    assert "--init" in run[: run.index("registry/triton:1")]


@pytest.mark.parametrize("setting", ["ADDRESS", "METRICS_ADDRESS"])
def test_the_pip_installed_triton_is_not_exposed_without_a_warning(serve, setting):
    stop = {"RUNTIME": "pip", "HTTP_PORT": "refused, before anything is installed"}
    warning = f"{setting}=0.0.0.0: the pip-installed Triton 24.10 has known holes"
    assert warning in serve(**stop, **{setting: "0.0.0.0"}).stderr
    for unexposed in (stop, stop | {setting: "127.0.0.2"}, stop | {"RUNTIME": "docker", setting: "0.0.0.0"}):
        assert "known holes" not in serve(programs=["docker"], **unexposed).stderr


def test_metrics_have_an_address_of_their_own_and_tls_keeps_http_on_this_machine(serve, recorded, tmp_path):
    for name in ("cert", "key"):
        (tmp_path / name).touch()
    done = serve(
        programs=["tritonserver"], METRICS_ADDRESS="127.0.0.2", TLS_CERT=tmp_path / "cert", TLS_KEY=tmp_path / "key"
    )
    assert done.returncode == 0, done.stderr
    (command,) = recorded()
    for argument in ("--http-address=127.0.0.1", "--grpc-address=0.0.0.0", "--metrics-address=127.0.0.2"):
        assert argument in command
    assert f"--grpc-server-cert={tmp_path / 'cert'}" in command
    assert "--grpc-use-ssl=true" in command
    assert not any("mutual" in argument for argument in command)


PROTOCOLS = "shared-memory,model-config,model-repository,statistics,trace,logging"


def test_docker_keeps_administration_shut_and_http_private_beside_tls(serve, recorded, tmp_path):
    cert, key = tmp_path / "cert", tmp_path / "key"
    cert.touch()
    key.touch()
    ports = {"HTTP_PORT": 18100, "GRPC_PORT": 18101, "METRICS_PORT": 18102}
    settings = {"RUNTIME": "docker", "IMAGE": "image", "ADMIN_KEY": "sesame", "TLS_CERT": cert, "TLS_KEY": key}
    done = serve(programs=["docker"], **settings, **ports)
    assert done.returncode == 0, done.stderr
    (run,) = recorded()
    inside = run[run.index("image") + 1 :]
    for option in ("--grpc-restricted-protocol", "--http-restricted-api"):
        assert f"{option}={PROTOCOLS}:nv-embed-admin=sesame" in inside
    tls = {"--grpc-use-ssl=true", f"--grpc-server-cert={cert}", f"--grpc-server-key={key}"}
    assert tls | {"--exit-timeout-secs=30"} <= set(inside)
    assert {f"type=bind,source={file},target={file},readonly" for file in (cert, key)} <= set(values(run, "--mount"))
    assert values(run, "--publish") == ["127.0.0.1:18100:8000", "0.0.0.0:18101:8001", "0.0.0.0:18102:8002"]


def test_the_images_own_command_keeps_administration_shut():
    lines = (REPO / "Dockerfile").read_text(encoding="utf-8").splitlines()
    (command,) = (json.loads(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD ["))
    assert f"key={PROTOCOLS}:nv-embed-admin=${{ADMIN_KEY:-" in command[-1]
    assert "--grpc-restricted-protocol=$key --http-restricted-api=$key" in command[-1]


def test_a_hugging_face_snapshot_is_mounted_with_the_blobs_its_links_lead_to(serve, recorded, tmp_path):
    cache = tmp_path / "models--nvidia--NV-Embed-v2"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    docker = tmp_path / "bin" / "docker"
    docker.write_text(
        RECORDER + '    record.write(json.dumps(os.environ["NV_EMBED_MODEL_PATH"]) + "\\n")\n', encoding="utf-8"
    )
    docker.chmod(0o755)
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        assert serve(RUNTIME="docker", IMAGE="i", MODEL_PATH=path).returncode == 0
        *_, run, inside = recorded()
        assert f"type=bind,source={cache},target=/models/NV-Embed-v2,readonly" in values(run, "--mount")
        assert inside == "/models/NV-Embed-v2/snapshots/abc"


@pytest.fixture
def prepare_venv(tmp_path):
    """Starts prepare_venv on tmp_path/venv with a requirements file of the given text."""

    def start(requirements, venv=tmp_path / "venv", **settings):
        file = tmp_path / "some" / "requirements.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(requirements)
        return subprocess.Popen(
            ["bash", "-c", 'source "$1" && prepare_venv "$2" "$3"', "-", REPO / "tools/prepare_venv.sh", venv, file],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TORCH_CPU_INDEX": "file:///absent", "PYTHON": sys.executable, **settings},
        )

    return start


def finish(process):
    _, message = process.communicate(timeout=120)
    return process.returncode, message


def test_a_prepared_venv_is_left_alone_and_a_failed_install_is_repeated(prepare_venv, tmp_path):
    code, message = finish(prepare_venv("./absent-package\n"))
    assert code != 0
    assert not list((tmp_path / "venv").glob("installed-*"))
    code, message = finish(prepare_venv("# nothing\n"))
    assert code == 0, message
    assert f"Installing into {tmp_path}/venv" in message
    assert finish(prepare_venv("# nothing\n")) == (0, "")
    code, message = finish(prepare_venv("# something else\n"))
    assert (code, "Installing" in message) == (0, True)


def test_a_venv_that_is_activated_is_made_anew_by_another_python(prepare_venv, tmp_path):
    assert finish(prepare_venv("# nothing\n"))[0] == 0
    (tmp_path / "venv" / "made-for").write_text("3.9.0 cpu\n")
    path = f"{tmp_path}/venv/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    code, message = finish(prepare_venv("# nothing\n", PYTHON="", PATH=path))
    assert code == 0, message
    assert "Installing" in message


@pytest.mark.skipif(shutil.which("flock") is None, reason="without flock concurrent starts are not protected")
def test_of_two_starts_at_once_one_prepares_and_the_other_waits(prepare_venv):
    results = [finish(process) for process in [prepare_venv("# nothing\n") for _ in range(2)]]
    assert [code for code, _ in results] == [0, 0]
    messages = "".join(message for _, message in results)
    assert messages.count("Installing") == 1
    assert messages.count("Waiting for another start") == 1


def test_a_folder_that_is_no_virtual_environment_is_neither_cleared_nor_used(prepare_venv, tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.txt").write_text("the only copy")
    code, message = finish(prepare_venv("# nothing\n"))
    assert code == 2
    assert "neither empty nor a virtual environment" in message
    assert [path.name for path in (tmp_path / "venv").iterdir()] == ["thesis.txt"]
