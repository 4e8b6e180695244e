"""What serve.sh decides and refuses by itself, before any model is loaded."""

import contextlib
import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from serving import SETTINGS, checkout, free_ports

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
        ignored = (*SETTINGS, "MALLOC_ARENA_MAX", "PYTHON")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ignored)}
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
            [script, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600
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


@pytest.mark.parametrize("setting", ["ADDRESS", "METRICS_ADDRESS", "GATEWAY_HOST"])
@pytest.mark.parametrize("address", ["8001", "embeddings.example.com", "::1", "[::1]"])
def test_what_is_no_ipv4_address_is_refused_before_anything_is_started(serve, tmp_path, setting, address):
    done = serve(programs=["tritonserver"], RUNTIME="native", **{setting: address})
    assert_refused(done, f"{setting}: expected an IPv4 address of this machine", f"got '{address}'")
    assert not (tmp_path / "record").exists()


@pytest.mark.parametrize("setting", ["HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "GATEWAY_PORT"])
@pytest.mark.parametrize("runtime", ["pip", "docker", "native"])
def test_a_port_in_use_is_said_before_anything_is_installed_or_started(serve, tmp_path, setting, runtime):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = serve(programs=["docker", "tritonserver"], RUNTIME=runtime, **{setting: port})
    assert_refused(done, f"{setting}: port {port} is already in use", f"choose free ports: {setting}=")
    assert not (tmp_path / "venv").exists()
    assert not (tmp_path / "record").exists()


def test_all_ports_in_use_are_said_at_once_with_free_ones(serve):
    settings = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT")
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in settings]
        ports = [server.getsockname()[1] for server in servers]
        done = serve(programs=["tritonserver"], RUNTIME="native", **dict(zip(settings, ports, strict=True)))
        assert_refused(
            done, *(f"{name}: port {port} is already in" for name, port in zip(settings, ports, strict=True))
        )
        offered = dict(re.findall(r"\b([A-Z]+_PORT)=([0-9]+) ", done.stderr))
        assert set(offered) == set(settings)
        assert not {*map(int, offered.values())} & {*ports}
        for port in offered.values():
            socket.create_server(("127.0.0.1", int(port))).close()


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
    ports = dict(zip(("HTTP_PORT", "GRPC_PORT", "METRICS_PORT"), free_ports(3), strict=True))
    done = serve(
        "--log-verbose=1",
        programs=["docker"],
        RUNTIME="docker",
        DEVICE="cuda:0",
        ADDRESS="localhost",
        **ports,
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
    assert values(run, "--publish") == [f"127.0.0.1:{port}:800{i}" for i, port in enumerate(ports.values())]
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


PROTOCOLS = "shared-memory,model-repository,statistics,trace,logging"


def test_docker_keeps_administration_shut_and_http_private_beside_tls(serve, recorded, tmp_path):
    cert, key = tmp_path / "cert", tmp_path / "key"
    cert.touch()
    key.touch()
    http, grpc, metrics = free_ports(3)
    ports = {"HTTP_PORT": http, "GRPC_PORT": grpc, "METRICS_PORT": metrics}
    settings = {"RUNTIME": "docker", "IMAGE": "image", "ADMIN_KEY": "sesame", "TLS_CERT": cert, "TLS_KEY": key}
    done = serve(programs=["docker"], **settings, **ports)
    assert done.returncode == 0, done.stderr
    (run,) = recorded()
    inside = run[run.index("image") + 1 :]
    for option in ("--grpc-restricted-protocol", "--http-restricted-api"):
        assert f"{option}={PROTOCOLS}:nv-embed-admin=sesame" in inside
    tls = {"--grpc-use-ssl=true", "--grpc-server-cert=/tls/TLS_CERT", "--grpc-server-key=/tls/TLS_KEY"}
    assert tls | {"--exit-timeout-secs=30"} <= set(inside)
    mounts = {f"type=bind,source={file},target=/tls/TLS_{file.name.upper()},readonly" for file in (cert, key)}
    assert mounts <= set(values(run, "--mount"))
    assert values(run, "--publish") == [f"127.0.0.1:{http}:8000", f"0.0.0.0:{grpc}:8001", f"0.0.0.0:{metrics}:8002"]


@pytest.mark.parametrize(
    ("setting", "value", "part"),
    [
        ("MAX_CONNECTION_SECONDS", "1m", "expected a whole number from 1 to 999999, got '1m'"),
        ("MAX_CONNECTION_SECONDS", "0", "expected a whole number"),
        ("TRACE_RATE", "0.5", "expected a whole number"),
        ("TRACE_URL", "collector:4318", "expected http://HOST:PORT/v1/traces"),
    ],
)
def test_an_age_of_connections_or_a_collector_that_makes_no_sense_is_refused(serve, setting, value, part):
    done = serve(programs=["tritonserver"], **{setting: value})
    assert done.returncode == 2
    assert f"{setting}: {part}" in done.stderr


def test_connections_have_an_age_and_traces_go_out_only_if_there_is_a_collector(serve, recorded):
    assert serve(programs=["tritonserver"], RUNTIME="native").returncode == 0
    settings = {"MAX_CONNECTION_SECONDS": "5", "TRACE_URL": "http://collector:4318/v1/traces", "TRACE_RATE": "10"}
    assert serve(programs=["tritonserver"], RUNTIME="native", **settings).returncode == 0
    plain, traced = recorded()
    assert "--grpc-max-connection-age=60000" in plain
    assert not any("trace-config" in argument for argument in plain)
    assert "--grpc-max-connection-age=5000" in traced
    assert "--trace-config=opentelemetry,url=http://collector:4318/v1/traces" in traced
    assert "--trace-config=rate=10" in traced


@pytest.mark.parametrize("name", ["a, b", 'a "b"', "a\nb", "[ü] $HOME; & \\ '", "ends in a line's end\n"])
def test_docker_mounts_folders_of_any_name(serve, recorded, tmp_path, name):
    folder = tmp_path / name
    for part in ("checkpoint", "models"):
        (folder / part).mkdir(parents=True)
    (folder / "cert").touch()
    done = serve(
        programs=["docker"],
        RUNTIME="docker",
        IMAGE="i",
        MODEL_PATH=folder / "checkpoint",
        MODEL_REPOSITORY=folder / "models",
        TLS_CERT=folder / "cert",
        TLS_KEY=folder / "cert",
    )
    assert done.returncode == 0, done.stderr
    mounts = [next(csv.reader([value])) for value in values(recorded()[0], "--mount")]  # as Docker reads them
    sources = {mount[1].removeprefix("source="): mount[2].removeprefix("target=") for mount in mounts}
    assert sources[str(folder / "models")] == "/model_repository"
    assert sources[str(folder / "checkpoint")] == "/models/NV-Embed-v2"
    assert str(folder / "cert") in sources


@pytest.mark.parametrize(
    "name", ["plain-1.0_x", "a b", "[x]", "it's", '"', "$HOME", "a&b", "a;b", "\\", "a\nb", "é", "漢"]
)
def test_tritonserver_gets_paths_that_need_no_quotes_and_lead_to_the_folders(serve, tmp_path, name):
    folders = {setting: tmp_path / name / setting for setting in ("MODEL_PATH", "MODEL_REPOSITORY")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    server = tmp_path / "bin" / "tritonserver"
    server.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "paths = [os.environ['NV_EMBED_MODEL_PATH'], sys.argv[1].partition('=')[2]]\n"
        "print(json.dumps([[path, os.path.realpath(path)] for path in paths]))\n"
    )
    server.chmod(0o755)
    done = serve(RUNTIME="native", **folders)
    assert done.returncode == 0, done.stderr
    for (path, real), (setting, folder) in zip(json.loads(done.stdout), folders.items(), strict=True):
        assert Path(real) == folder.resolve()
        assert re.fullmatch(r"[\w./@%+=,-]+", path, re.ASCII)
        assert (path == real) == name.startswith("plain")
        assert (f"{setting}={path} stands for '{folder}'" in done.stderr) != (path == real)


# --- several models -------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """A copy of this repository to which models may be added."""
    return checkout(tmp_path / "copy")


@pytest.fixture
def other(tmp_path):
    """Makes what looks like a checkpoint of another kind than NV-Embed-v2's."""

    def make(*names):
        folder = tmp_path.joinpath(*names)
        shutil.copytree(REPO / "test/data/nemotron-toy", folder, ignore=lambda *_: {"model.safetensors", "README.md"})
        return folder

    return make


def add(copy, name, folder, *parameters):
    command = [copy / "tools" / "add_model", name, folder, *parameters]
    subprocess.run(command, capture_output=True, check=True)


STATE = f"""#!{sys.executable}
import json, os, sys
repository = sys.argv[1].partition("=")[2]
models = {{name: os.path.isfile(os.path.join(repository, name, "1", "model.py")) for name in os.listdir(repository)}}
variables = {{name: value for name, value in os.environ.items() if name.startswith("NV_EMBED_")}}
print(json.dumps([repository, models, variables]))
"""


@pytest.fixture
def state(serve, tmp_path):
    """What a tritonserver on PATH sees: its repository, whether each model there has its code, the variables."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tritonserver").write_text(STATE)
    (tmp_path / "bin" / "tritonserver").chmod(0o755)

    def run(**settings):
        done = serve(RUNTIME="native", **settings)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_another_kind_of_checkpoint_has_its_folders_name_and_its_own_repository_with_what_was_added(
    state, copy, other, tmp_path
):
    add(copy, "added", other("some", "added"))
    folder = other("models", "bge-large-en-v1.5")
    repository, models, variables = state(script=copy / "serve.sh", MODEL_PATH=folder, DEVICE="cpu")
    assert models == {"added": True, "bge-large-en-v1.5": True}
    config = (Path(repository) / "bge-large-en-v1.5" / "config.pbtxt").read_text(encoding="utf-8")
    default = (copy / "model_repository" / "nv-embed-v2" / "config.pbtxt").read_text(encoding="utf-8")
    assert config == default.replace('name: "nv-embed-v2"', 'name: "bge-large-en-v1.5"')
    assert variables == {
        "NV_EMBED_MODEL_NAME": "bge-large-en-v1.5", "NV_EMBED_MODEL_PATH": str(folder), "NV_EMBED_DEVICE": "cpu",
    }  # fmt: skip
    again, *_ = state(script=copy / "serve.sh", MODEL_PATH=folder)
    assert again == repository  # which may be another server's
    add(copy, "more", other("more"))
    changed, models, _ = state(script=copy / "serve.sh", MODEL_PATH=folder)
    assert changed != repository
    assert set(models) == {"added", "more", "bge-large-en-v1.5"}


def test_nv_embeds_own_format_is_served_under_its_name_whatever_its_folders(state, copy, other, toy):
    add(copy, "added", other("added"))
    repository, models, variables = state(script=copy / "serve.sh", MODEL_PATH=toy)
    assert repository == str(copy / "model_repository")
    assert models == {"added": True, "nv-embed-v2": True}
    assert variables["NV_EMBED_MODEL_NAME"] == "nv-embed-v2"


@pytest.mark.parametrize(
    ("names", "link", "served"),
    [
        (("models--BAAI--bge-m3", "snapshots", "abc"), None, "bge-m3"),
        (("models--gpt2", "snapshots", "abc"), None, "gpt2"),
        (("a b",), "plain", "plain"),
        (("real",), None, "real"),
    ],
)
def test_a_model_is_named_as_its_folder_or_as_the_repository_of_a_snapshot(
    state, copy, other, tmp_path, names, link, served
):
    folder = other(*names)
    if link:
        (tmp_path / link).symlink_to(folder)
        folder = tmp_path / link
    _, models, _ = state(script=copy / "serve.sh", MODEL_PATH=f"{folder}/")
    assert models == {served: True}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a b", "characters at most); got 'a b'; rename it, or give a link to it that has such a name"),
        ("added", "expected a folder named as no other model; got 'added'; rename it, or remove"),
        ("nv-embed-v2", "expected a folder named as no other model; got 'nv-embed-v2'"),
    ],
)
def test_a_folder_whose_name_no_model_can_have_is_refused(serve, copy, other, name, message):
    add(copy, "added", other("elsewhere"))
    done = serve(script=copy / "serve.sh", programs=["tritonserver"], RUNTIME="native", MODEL_PATH=other(name))
    assert_refused(done, "serve.sh: MODEL_PATH: ", message)


def test_a_name_that_the_model_would_not_have_is_refused(serve, copy, other, toy):
    settings = {"script": copy / "serve.sh", "programs": ["tritonserver"], "RUNTIME": "native"}
    for folder, name in ((other("bge"), "bge"), (toy, "nv-embed-v2")):
        done = serve(MODEL_PATH=folder, NV_EMBED_MODEL_NAME="mine", **settings)
        assert_refused(
            done, f"expected none, because serve.sh names the model, here '{name}'; found", "'mine'. Unset it."
        )
        assert serve(MODEL_PATH=folder, NV_EMBED_MODEL_NAME=name, **settings).returncode == 0


def test_where_no_repository_can_be_made_the_start_is_refused(serve, copy, other):
    (copy / ".served").touch()
    done = serve(script=copy / "serve.sh", programs=["tritonserver"], RUNTIME="native", MODEL_PATH=other("a"))
    assert_refused(done, "MODEL_PATH: expected to make", ".served/a-", "File exists; have the owner of")


def test_starts_at_once_make_one_repository(copy, other):
    folder = other("a")
    command = [sys.executable, copy / "tools/served_models.py", copy / "model_repository", folder, "a"]
    starts = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    assert len({process.communicate()[0] for process in starts}) == 1
    assert {process.returncode for process in starts} == {0}
    assert len(list((copy / ".served").iterdir())) == 1


def test_a_model_that_is_removed_stays_in_the_repository_of_a_running_server(state, copy, other):
    add(copy, "added", other("added"), "device=cpu")
    (copy / "model_repository" / "lost+found").mkdir()
    folder = other("bge")
    repository, models, _ = state(script=copy / "serve.sh", MODEL_PATH=folder)
    assert models == {"added": True, "bge": True}
    shutil.rmtree(copy / "model_repository" / "added")
    assert all((Path(repository) / name / "1" / "model.py").is_file() for name in ("added", "bge"))
    another, models, _ = state(script=copy / "serve.sh", MODEL_PATH=folder)
    assert models == {"bge": True}
    add(copy, "added", folder, "device=cpu", "cache_mebibytes=0")
    third, models, _ = state(script=copy / "serve.sh", MODEL_PATH=folder)
    assert models == {"added": True, "bge": True}
    assert len({repository, another, third}) == 3


@pytest.mark.skipif(not shutil.which("flock"), reason="without it nothing is locked or removed")
def test_repositories_that_nobody_uses_are_removed_after_a_day(serve, copy, other, tmp_path):
    (tmp_path / "bin").mkdir()
    running = tmp_path / "bin" / "tritonserver"
    running.write_text('#!/bin/sh\necho "$1"\nread -r line <"$WAIT" || true\n')
    running.chmod(0o755)
    wait = tmp_path / "wait"
    os.mkfifo(wait)
    yesterday = time.time() - 25 * 60 * 60

    def age():
        for folder in (copy / ".served").iterdir():
            os.utime(folder, (yesterday, yesterday))

    def names():
        return sorted(folder.name.rpartition("-")[0] for folder in (copy / ".served").iterdir())

    settings = {"script": copy / "serve.sh", "RUNTIME": "native"}
    with ThreadPoolExecutor(1) as thread:
        held = thread.submit(serve, MODEL_PATH=other("held"), WAIT=wait, **settings)
        with wait.open("w") as end:  # as soon as the server waits
            for name in ("old", "new"):
                assert serve(MODEL_PATH=other(name), WAIT=os.devnull, **settings).returncode == 0
                assert names() == (["held", "old"] if name == "old" else ["held", "new"])
                age()
            end.write("\n")
        assert held.result().returncode == 0
    assert serve(MODEL_PATH=tmp_path / "new", WAIT=os.devnull, **settings).returncode == 0
    assert names() == ["new"]


@pytest.mark.skipif(
    Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None, reason="this machine has a GPU"
)
def test_a_gpu_that_an_added_model_needs_and_is_not_there_is_said_before_anything_is_installed(serve, copy, other, toy):
    add(copy, "on-gpu", other("on-gpu"), "device=cpu,cuda:0")
    done = serve(script=copy / "serve.sh", RUNTIME="pip", MODEL_PATH=toy)
    assert_refused(done, "Model on-gpu, device cpu,cuda:0: expected an NVIDIA GPU, found none.")
    assert f"Set device to cpu in {copy}/model_repository/on-gpu/config.pbtxt, or remove that folder." in done.stderr


def test_docker_mounts_what_every_model_and_every_link_needs(serve, recorded, copy, other, tmp_path):
    snapshot = other("hub", "models--BAAI--bge-m3", "snapshots", "abc")
    add(copy, "one", snapshot, "device=cuda:1")
    add(copy, "two", snapshot)
    add(copy, "three", other("a, b"))
    done = serve(
        script=copy / "serve.sh",
        programs=["docker"],
        RUNTIME="docker",
        IMAGE="i",
        MODEL_PATH=other("served"),
        DEVICE="cpu",
    )
    assert done.returncode == 0, done.stderr
    (run,) = recorded()
    assert values(run, "--gpus") == ["all"]
    assert "NV_EMBED_MODEL_NAME" in values(run, "--env")
    assert run[run.index("i") + 2] == "--model-repository=/served/models"
    mounts = [next(csv.reader([value])) for value in values(run, "--mount")]  # as Docker reads them
    inside = {mount[2].removeprefix("target="): Path(mount[1].removeprefix("source=")) for mount in mounts}
    assert len(mounts) == len(inside) == 5
    assert inside["/models/NV-Embed-v2"] == tmp_path / "served"
    cache = tmp_path / "hub" / "models--BAAI--bge-m3"
    assert inside[str(cache)] == cache  # with the blobs that the snapshot's links lead to
    assert inside[str(tmp_path / "a, b")] == tmp_path / "a, b"
    for place in ("models", "shared"):
        shutil.copytree(inside[f"/served/{place}"], tmp_path / "container" / "served" / place, symlinks=True)
    for model in ("served", "one", "two", "three"):
        assert (tmp_path / "container" / "served" / "models" / model / "1" / "model.py").is_file()


def test_a_gpu_that_only_an_added_model_needs_counts(serve, recorded, copy, other, toy):
    add(copy, "on-gpu", other("on-gpu"), "device=cuda:0")
    done = serve(script=copy / "serve.sh", programs=["docker", "nvidia-smi"], MODEL_PATH=toy, DEVICE="cpu", IMAGE="i")
    assert done.returncode == 0, done.stderr
    run = recorded()[-1]
    assert run[:2] == ["docker", "run"]
    assert values(run, "--gpus") == ["all"]
    assert "--allow-gpu-metrics=false" not in run


def test_packages_of_a_kind_are_installed_only_where_it_is_served(copy):
    script = (
        'repo=$0; source "$0/tools/models.sh"; kinds=("$@"); requirements_of_kinds; printf "%s\\n" "${requirements[@]}"'
    )

    def required(*kinds):
        command = ["bash", "-euc", script, copy, *kinds]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    requirements = copy / "model_repository" / "nv-embed-v2" / "requirements-some-library.txt"
    requirements.touch()
    assert required() == required("nv_embed", "") == []
    assert required("nv_embed", "some_library", "some_library") == [str(requirements)]


def test_an_image_is_built_with_the_packages_of_a_kind_that_is_served(serve, recorded, copy, other, toy):
    (copy / "model_repository" / "nv-embed-v2" / "requirements-nemotron.txt").touch()
    for folder, arguments in ((toy, []), (other("served"), ["EXTRA_REQUIREMENTS=requirements-nemotron.txt"])):
        done = serve(script=copy / "serve.sh", programs=["docker"], RUNTIME="docker", MODEL_PATH=folder)
        assert done.returncode == 0, done.stderr
        build = recorded()[-2]
        assert build[:2] == ["docker", "build"]
        assert values(build, "--build-arg") == arguments


# --- the gateway ----------------------------------------------------------------------------------------


def test_gateway_arguments_with_an_open_quote_are_refused(serve, tmp_path):
    (port,) = free_ports(1)
    done = serve(GATEWAY_PORT=port, GATEWAY_ARGUMENTS='--alias "a b')
    assert_refused(done, "GATEWAY_ARGUMENTS: expected words, quoted as in a shell", '--alias "a b')
    assert not (tmp_path / "venv").exists()


def test_a_gateway_that_could_not_reach_the_server_over_tls_is_refused_with_what_to_set(serve, tmp_path):
    (port,) = free_ports(1)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=example.com",
         "-addext", "subjectAltName=DNS:example.com", "-keyout", "key", "-out", "cert"],
        cwd=tmp_path, capture_output=True, check=True,
    )  # fmt: skip
    settings = {"GATEWAY_PORT": port, "TLS_CERT": "cert", "TLS_KEY": "key"}
    assert_refused(serve(**settings), "expected a certificate for localhost", "--triton-url NAME:")
    done = serve(**settings, TLS_CLIENT_CA="cert")
    assert_refused(done, "expected a certificate for the gateway, got none", "--triton-certificate-chain FILE")
    assert not (tmp_path / "venv").exists()


def test_the_gateways_environment_has_what_the_client_declares():
    requirements = (REPO / "tools/requirements-gateway.txt").read_text(encoding="utf-8")
    pinned = set(re.findall(r"^([a-z-]+)(?:\[\w+\])?==", requirements, re.M))
    project = (REPO / "client/pyproject.toml").read_text(encoding="utf-8")
    lists = [re.search(rf"^{name} = \[(.*?)^\]", project, re.M | re.S)[1] for name in ("dependencies", "gateway")]
    declared = set(re.findall(r'^  "([a-z-]+)', "".join(lists), re.M))
    assert {"numpy", "fastapi"} <= declared
    assert pinned == declared


# --- the environment ------------------------------------------------------------------------------------


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
    _, message = process.communicate(timeout=600)  # making an environment takes long on a busy machine
    return process.returncode, message


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_start_that_needs_fewer_packages_than_the_last_installs_and_removes_nothing(tmp_path):
    files = [tmp_path / "requirements.txt", tmp_path / "requirements-some-library.txt"]
    for file in files:
        file.write_text(f"# {file.name}\n")

    def prepare(*needed):
        command = ["bash", "-c", 'source "$0" && prepare_venv "$@"', REPO / "tools/prepare_venv.sh", tmp_path / "venv"]
        environ = os.environ | {"PYTHON": sys.executable}
        return subprocess.run([*command, *needed], env=environ, capture_output=True, text=True, check=True).stderr

    assert "Installing" in prepare(files[0])
    assert "Installing" in prepare(*files)
    assert prepare(files[0]) == prepare(*files) == ""


@pytest.mark.slow
def test_a_venv_that_is_activated_is_made_anew_by_another_python(prepare_venv, tmp_path):
    assert finish(prepare_venv("# nothing\n"))[0] == 0
    (tmp_path / "venv" / "made-for").write_text("3.9.0 cpu\n")
    path = f"{tmp_path}/venv/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    code, message = finish(prepare_venv("# nothing\n", PYTHON="", PATH=path))
    assert code == 0, message
    assert "Installing" in message


@pytest.mark.skipif(shutil.which("flock") is None, reason="without flock concurrent starts are not protected")
@pytest.mark.slow
def test_of_two_starts_at_once_one_prepares_and_the_other_waits(prepare_venv):
    results = [finish(process) for process in [prepare_venv("# nothing\n") for _ in range(2)]]
    assert [code for code, _ in results] == [0, 0]
    messages = "".join(message for _, message in results)
    assert messages.count("Installing") == 1
    assert messages.count("Waiting for another start") == 1


@pytest.mark.slow
def test_an_environment_is_for_every_user_and_says_what_another_user_cannot_do(prepare_venv, tmp_path):
    previous = os.umask(0o077)
    try:
        code, message = finish(prepare_venv("# nothing\n"))
    finally:
        os.umask(previous)
    assert code == 0, message
    for path in (tmp_path / "venv").rglob("*"):
        assert path.is_symlink() or path.stat().st_mode & 0o044 == 0o044, path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a [b]*? 'q' \"d\" $HOME & ; \\ é漢", "a\nb"])
def test_an_environment_in_a_folder_of_any_name_is_made_once_and_made_anew(prepare_venv, tmp_path, name):
    venv = tmp_path / name
    code, message = finish(prepare_venv("# nothing\n", venv))
    assert code == 0, message
    assert finish(prepare_venv("# nothing\n", venv)) == (0, "")
    (venv / "made-for").write_text("3.9.0 cpu\n")
    assert finish(prepare_venv("# nothing\n", venv))[0] == 0
    assert finish(prepare_venv("# nothing\n", venv)) == (0, "")


def test_an_environment_in_a_folder_with_a_colon_is_refused(prepare_venv, tmp_path):
    code, message = finish(prepare_venv("# nothing\n", tmp_path / "a:b"))
    assert code == 2
    assert f"{tmp_path}/a:b: expected a path without a colon" in message


@pytest.mark.slow
def test_a_folder_that_is_no_virtual_environment_is_neither_cleared_nor_used(prepare_venv, tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.txt").write_text("the only copy")
    code, message = finish(prepare_venv("# nothing\n"))
    assert code == 2
    assert "neither empty nor a virtual environment" in message
    assert [path.name for path in (tmp_path / "venv").iterdir()] == ["thesis.txt"]
