"""tools/add_model: what it writes, what it refuses; and how the folders it wrote are read again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from google.protobuf import text_format
from serving import ROOT, checkout
from tritonclient.grpc import model_config_pb2

PARAMETERS = ("device=cpu", "query_prompt=Ünïcode \"q\" 'q' \\n \\\\ \t\n line # no comment {}: ", "cache_mebibytes=0")


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A copy to which models may be added."""
    return checkout(tmp_path_factory.mktemp("a repository"))


def add(repository: Path, *arguments: str | bytes | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, repository / "tools" / "add_model", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=repository)


def config_of(repository: Path, name: str) -> model_config_pb2.ModelConfig:
    """As Triton reads it."""
    text = (repository / "model_repository" / name / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_a_model_has_the_given_parameters_and_all_else_of_the_default_one(repository, toy):
    done = add(repository, "a-1.b_C", toy, *PARAMETERS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{repository}/model_repository/a-1.b_C: {toy} (nv_embed) on cpu\n"
    ours, default = config_of(repository, "a-1.b_C"), config_of(repository, "nv-embed-v2")
    parameters = {name: parameter.string_value for name, parameter in ours.parameters.items()}
    assert parameters == {"model_path": str(toy)} | dict(word.split("=", 1) for word in PARAMETERS)
    assert ours.name == "a-1.b_C"
    for config in (ours, default):
        config.ClearField("parameters")
        config.ClearField("name")
    assert ours == default
    code = repository / "model_repository" / "a-1.b_C" / "1"
    assert os.readlink(code) == "../nv-embed-v2/1"
    assert (code / "model.py").is_file()


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
@pytest.mark.parametrize("has_gpu", [True, False])
def test_the_device_is_the_cpu_unless_this_machine_has_a_gpu_or_another_is_given(repository, toy, tmp_path, has_gpu):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nexit {0 if has_gpu else 1}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    command = [sys.executable, repository / "tools" / "add_model", f"device-{has_gpu}", toy]
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    device = config_of(repository, f"device-{has_gpu}").parameters["device"].string_value
    if has_gpu:
        assert device == ""  # the default
        assert done.stdout.endswith("(nv_embed) on cuda:0\n")
    else:
        assert device == "cpu"
        assert done.stdout.endswith(" on cpu, because this machine has no GPU; device=cuda:0 is for one that has\n")
    subprocess.run([*command[:2], f"given-{has_gpu}", toy, "device=cuda:1"], check=True, env=environ)
    assert config_of(repository, f"given-{has_gpu}").parameters["device"].string_value == "cuda:1"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system")
def test_two_file_systems_are_refused_with_what_makes_one_of_them(toy, tmp_path):
    repository = checkout(tmp_path / "copy")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        if os.stat(other).st_dev == os.stat(repository).st_dev:
            pytest.skip("needs a second file system")
        (repository / ".served").symlink_to(other)
        done = add(repository, "new", toy)
        assert done.returncode == 2
        assert (
            f"add_model: expected {repository}/.served and {repository}/model_repository on the same fi" in done.stderr
        )
        assert "make" in done.stderr
        (repository / "on").mkdir()
        (repository / ".served").unlink()
        (repository / ".served").symlink_to(repository / "on")  # as the message says
        assert add(repository, "new", toy).returncode == 0


def test_the_path_of_a_checkpoint_is_absolute_and_without_links(repository, toy, tmp_path):
    (repository / "here").symlink_to(toy)
    assert add(repository, "linked", "here").returncode == 0
    assert config_of(repository, "linked").parameters["model_path"].string_value == str(toy)


def test_what_is_refused_is_said_in_three_parts_and_leaves_nothing_behind(repository, toy, tmp_path):
    before = sorted(repository.rglob("*"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard of"}), encoding="utf-8")
    for arguments, message in (
        (["nv-embed-v2", toy], "NAME: expected one that is free; got 'nv-embed-v2'; choose another name"),
        (["a/b", toy], "NAME: expected a letter or digit, then letters, digits and ._-"),
        ([".", toy], "got '.'; choose another name"),
        (["x" * 101, toy], "100 characters at most"),
        (["new", tmp_path / "absent"], "expected the folder of a checkpoint; got"),
        (["new", tmp_path], "'unheard of'"),
        (["new", toy, "dtype"], "parameter: expected parameter=value; got 'dtype'; correct it"),
        (["new", toy, "dtype=wide"], "'float8' or 'int8'; got 'wide'; correct it"),
        (["new", toy, "colour=red"], "expected the name of a parameter; got 'colour'"),
        (["new", toy, "model_path=/x"], "each once, and model_path as FOLDER; got 'model_path' again"),
        (["new", toy, "dtype=int8", "dtype=int8"], "each once, and model_path as FOLDER; got 'dtype' again"),
        (["new", toy, "max_request_bytes=9", "max_queue_bytes=8"], "lower max_request_bytes or raise max_queue_bytes"),
        (["new", toy, b"query_prompt=\xff"], "expected text in UTF-8; got '\\udcff'; correct it"),
    ):
        done = add(repository, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("add_model: ")
        assert message in done.stderr
    assert sorted(path for path in repository.rglob("*") if "__pycache__" not in path.parts) == [
        path for path in before if "__pycache__" not in path.parts
    ]


def test_of_two_that_add_the_same_name_at_once_one_does_and_the_other_is_refused(repository, toy):
    command = [sys.executable, repository / "tools" / "add_model", "twice", toy]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    messages = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], messages
    assert config_of(repository, "twice").name == "twice"


def test_git_knows_no_model_that_was_added():
    ignored = ["model_repository/a", ".served/a"]
    done = subprocess.run(
        ["git", "check-ignore", *ignored, "model_repository/nv-embed-v2/config.pbtxt"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 128:
        pytest.skip("no checkout of git's")
    assert done.stdout.split() == ignored


def served(repository: Path, model_path: Path, name: str) -> list[str]:
    """What tools/served_models.py says."""
    command = [sys.executable, ROOT / "tools" / "served_models.py", repository, model_path, name]
    done = subprocess.run(command, capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def test_added_models_are_seen_with_kind_device_and_checkpoint_however_their_files_are_written(tmp_path, toy):
    for name, config in (
        ("b", f'parameters {{ key: "model_path" value {{ string_value: "{toy}" }} }}'),
        ("c", f"""parameters: [ # key: "device" value {{ string_value: "cuda:9" }}
            {{ key: 'model_path', value: {{ string_value : "{toy}#\\"\\n" }} }},
            {{ key: "device" value {{ string_value: "cpu,cuda:1" }} }} ]"""),
        ("not-ours", 'backend: "onnxruntime"'),
        ("nv-embed-v2", 'parameters { key: "model_path" value { string_value: "/elsewhere" } }'),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.pbtxt").write_text(config, encoding="utf-8")
    (tmp_path / "no-model").mkdir()
    assert served(tmp_path, toy, "any") == [
        "nv-embed-v2", str(tmp_path), "", "nv_embed",
        "b", "nv_embed", "cuda:0", str(toy),
        "c", "", "cpu,cuda:1", f'{toy}#"',
    ]  # fmt: skip
