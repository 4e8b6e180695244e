"""The pip-installed Triton: its conditions, its messages, its layout, and that it really starts."""

import dataclasses
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "pip_triton.py"


def load_script():
    spec = importlib.util.spec_from_file_location("pip_triton", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["pip_triton"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


pip_triton = load_script()


@pytest.fixture
def machine(tmp_path):
    """A machine where everything holds."""
    library = tmp_path / "python" / "lib" / "libpython3.11.so.1.0"
    library.parent.mkdir(parents=True)
    library.touch()
    return pip_triton.Machine(
        system="Linux",
        architecture="x86_64",
        glibc=(2, 35),
        python=(3, 11),
        libpython_name=library.name,
        libpython_folders=(tmp_path / "absent", library.parent),
    )


@pytest.fixture
def package(tmp_path):
    """The wheel's folders with empty binaries."""
    package = tmp_path / "site-packages" / "pytriton"
    triton = package / "tritonserver"
    for part in (
        "bin/tritonserver",
        "backends/python/libtriton_python.so",
        "backends/python/triton_python_backend_utils.py",
        "python_backend_stubs/3.11/triton_python_backend_stub",
    ):
        (triton / part).parent.mkdir(parents=True, exist_ok=True)
        (triton / part).write_text(part)
    return package


def test_a_machine_where_everything_holds_gives_the_interpreters_own_library(machine):
    assert pip_triton.check(machine) == machine.libpython_folders[1] / "libpython3.11.so.1.0"


@pytest.mark.parametrize(
    ("change", "condition", "found"),
    [
        ({"system": "Darwin"}, "operating system: expected Linux", "found Darwin"),
        ({"architecture": "aarch64"}, "processor: expected x86_64", "found aarch64"),
        ({"glibc": None}, "C library: expected glibc 2.35", "found another one"),
        ({"glibc": (2, 31)}, "C library: expected glibc 2.35", "found 2.31"),
        ({"python": (3, 9)}, "Python: expected one of 3.10, 3.11, 3.12", "found 3.9"),
        ({"python": (3, 13)}, "Python: expected one of 3.10, 3.11, 3.12", "found 3.13"),
        (
            {"libpython_folders": (Path("/absent/lib"),)},
            "shared library of Python: expected libpython3.11.so.1.0",
            "found none in /absent/lib",
        ),
    ],
)
def test_a_condition_that_fails_is_named_with_what_was_found(machine, change, condition, found):
    with pytest.raises(pip_triton.ConditionError) as raised:
        pip_triton.check(dataclasses.replace(machine, **change))
    assert condition in str(raised.value)
    assert found in str(raised.value)


def test_a_failed_condition_ends_with_2_and_the_docker_line_with_the_same_settings(machine, monkeypatch, capsys):
    arm = dataclasses.replace(machine, architecture="aarch64")
    monkeypatch.setattr(pip_triton.Machine, "here", classmethod(lambda cls: arm))
    monkeypatch.setenv("NV_EMBED_MODEL_PATH", "/models/with space")
    monkeypatch.setenv("NV_EMBED_DEVICE", "cuda:0")
    with pytest.raises(SystemExit) as ended:
        pip_triton.main(["--model-repository=/models"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "processor" in message
    assert f"RUNTIME=docker MODEL_PATH='/models/with space' DEVICE=cuda:0 {SCRIPT.parent.parent}/serve.sh" in message


def test_the_layout_holds_backend_stub_and_library_and_is_made_once(machine, package, tmp_path):
    library = pip_triton.check(machine)
    layout = pip_triton.lay_out(package, "0.7.0", (3, 11), library, tmp_path / "venv")
    backend = layout.backends / "python"
    assert {path.name for path in backend.iterdir()} == {
        "libtriton_python.so",
        "triton_python_backend_stub",
        "triton_python_backend_utils.py",
    }
    assert (layout.library_folders[1] / "libpython3.11.so.1.0").resolve() == library
    inode = backend.stat().st_ino
    assert pip_triton.lay_out(package, "0.7.0", (3, 11), library, tmp_path / "venv") == layout
    assert backend.stat().st_ino == inode
    assert len(list((tmp_path / "venv").iterdir())) == 1


def test_another_version_or_python_library_gets_a_layout_of_its_own(machine, package, tmp_path):
    library = pip_triton.check(machine)
    moved = tmp_path / library.name
    shutil.copy(library, moved)
    layouts = {
        pip_triton.lay_out(package, version, (3, 11), path, tmp_path / "venv").backends
        for version, path in (("0.7.0", library), ("0.7.1", library), ("0.7.0", moved))
    }
    assert len(layouts) == 3


def test_an_interrupted_layout_is_never_used(machine, package, tmp_path, monkeypatch):
    def disk_full(*_):
        raise OSError(28, "No space left on device")

    library = pip_triton.check(machine)
    with monkeypatch.context() as patch:
        patch.setattr(pip_triton.shutil, "copy", disk_full)
        with pytest.raises(OSError, match="No space left"):
            pip_triton.lay_out(package, "0.7.0", (3, 11), library, tmp_path / "venv")
    assert list((tmp_path / "venv").iterdir()) == []
    layout = pip_triton.lay_out(package, "0.7.0", (3, 11), library, tmp_path / "venv")
    assert (layout.backends / "python" / "triton_python_backend_stub").is_file()


def test_two_starts_at_once_end_with_one_complete_layout(machine, package, tmp_path, monkeypatch):
    library = pip_triton.check(machine)
    copy = shutil.copy
    faster = []

    def copy_after_a_faster_start(*arguments):
        monkeypatch.setattr(pip_triton.shutil, "copy", copy)
        faster.append(pip_triton.lay_out(package, "0.7.0", (3, 11), library, tmp_path / "venv"))
        return copy(*arguments)

    monkeypatch.setattr(pip_triton.shutil, "copy", copy_after_a_faster_start)
    assert [pip_triton.lay_out(package, "0.7.0", (3, 11), library, tmp_path / "venv")] == faster
    assert len(list((tmp_path / "venv").iterdir())) == 1


def test_a_wheel_without_a_stub_for_this_python_is_a_failed_condition(machine, package, tmp_path):
    with pytest.raises(pip_triton.ConditionError, match=r"3\.10/triton_python_backend_stub, found none"):
        pip_triton.lay_out(package, "0.7.0", (3, 10), pip_triton.check(machine), tmp_path / "venv")


def test_the_server_finds_its_own_libraries_and_python_first_and_keeps_the_callers_settings(tmp_path):
    layout = pip_triton.Layout(Path("/server"), Path("/backends"), (Path("/wheel.libs"), Path("/layout/lib")))
    caller = {"PATH": "/usr/bin", "LD_LIBRARY_PATH": "/cuda", "NV_EMBED_DEVICE": "cpu"}
    environment = pip_triton.server_environment(layout, caller, Path("/venv/bin"))
    assert environment == {
        "PATH": "/venv/bin:/usr/bin",
        "LD_LIBRARY_PATH": "/wheel.libs:/layout/lib:/cuda",
        "NV_EMBED_DEVICE": "cpu",
        "MALLOC_ARENA_MAX": "2",
    }
    own = pip_triton.server_environment(layout, {"PATH": "/usr/bin", "MALLOC_ARENA_MAX": "4"}, Path("/venv/bin"))
    assert own["MALLOC_ARENA_MAX"] == "4"
    assert own["LD_LIBRARY_PATH"] == "/wheel.libs:/layout/lib"


@pytest.mark.skipif(importlib.util.find_spec("pytriton") is None, reason="nvidia-pytriton is not installed")
def test_the_real_server_starts_from_the_wheel():
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=False, timeout=60)
    assert "--model-repository" in done.stdout + done.stderr
