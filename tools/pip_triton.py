"""Runs the tritonserver of the nvidia-pytriton wheel as a plain server, without Docker.

    .venv/bin/python tools/pip_triton.py --model-repository=... [further arguments of tritonserver]
    .venv/bin/python tools/pip_triton.py --lay-out
    python3 tools/pip_triton.py --check-only

The wheel carries the server, its Python backend and one backend process ("stub") per Python version, but not laid
out for a server that is started by hand. This script checks that they can run here, lays them out inside the
virtual environment and becomes the server. `--check-only` checks only what must hold before anything is installed.
`--lay-out` ends before the server starts. If a condition fails, each form ends with exit code 2 and says what works.

Needs the standard library only: it also runs before the virtual environment exists. Knows no model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

MIN_GLIBC = (2, 35)
# The wheel has stubs for 3.8 to 3.13; torch needs 3.10, and numpy 1.26, which these stubs need, ends with 3.12.
PYTHON_VERSIONS = ((3, 10), (3, 11), (3, 12))
DISTRIBUTION = "nvidia-pytriton"


class ConditionError(Exception):
    """The pip-installed Triton cannot run here: the message has what was expected, what was found, what to do."""


@dataclass(frozen=True)  # no slots: Python 3.9, which macOS brings, must get as far as the message
class Machine:
    """What decides whether the wheel's binaries can run: the platform and the interpreter."""

    system: str
    architecture: str
    glibc: tuple[int, ...] | None
    """None: another C library."""
    python: tuple[int, int]
    libpython_name: str
    libpython_folders: tuple[Path, ...]

    @classmethod
    def here(cls) -> Machine:
        """Describes the running interpreter and its machine."""
        name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
        # LIBDIR is where the interpreter was built to live; one that was moved has its library beside it.
        folders = [Path(sys.base_prefix, "lib")]
        if libdir := sysconfig.get_config_var("LIBDIR"):
            folders.insert(0, Path(libdir))
        return cls(
            system=platform.system(),
            architecture=platform.machine(),
            glibc=_glibc_version(),
            python=sys.version_info[:2],
            libpython_name=name,
            libpython_folders=tuple(folders),
        )

    def libpython(self) -> Path | None:
        """The interpreter's shared library, or None where it was built or packaged without one."""
        candidates = (folder / self.libpython_name for folder in self.libpython_folders)
        return next((path for path in candidates if path.is_file()), None)


@dataclass(frozen=True)
class Layout:
    """Where the parts of a server that can be started lie."""

    server: Path
    backends: Path
    library_folders: tuple[Path, ...]


def check(machine: Machine) -> Path:
    """Returns the interpreter's shared library, or raises `ConditionError` naming the first condition that fails."""
    if machine.system != "Linux":
        raise ConditionError(f"operating system: expected Linux, found {machine.system}")
    if machine.architecture != "x86_64":
        raise ConditionError(f"processor: expected x86_64, found {machine.architecture}")
    if machine.glibc is None:
        raise ConditionError(f"C library: expected glibc {_dotted(MIN_GLIBC)} or newer, found another one")
    if machine.glibc < MIN_GLIBC:
        raise ConditionError(f"C library: expected glibc {_dotted(MIN_GLIBC)} or newer, found {_dotted(machine.glibc)}")
    if machine.python not in PYTHON_VERSIONS:
        expected = ", ".join(map(_dotted, PYTHON_VERSIONS))
        raise ConditionError(
            f"Python: expected one of {expected}, found {_dotted(machine.python)} "
            "(PYTHON=/path/to/python3.x chooses another one)"
        )
    library = machine.libpython()
    if library is None:
        folders = " or ".join(map(str, dict.fromkeys(machine.libpython_folders)))
        raise ConditionError(
            f"shared library of Python: expected {machine.libpython_name}, found none in {folders} "
            f"(Debian and Ubuntu: apt install libpython{_dotted(machine.python)}; pyenv: rebuild with "
            "PYTHON_CONFIGURE_OPTS=--enable-shared)"
        )
    return library


def lay_out(package: Path, version: str, python: tuple[int, int], libpython: Path, parent: Path) -> Layout:
    """Puts the backend, its stub and a link to `libpython` into one folder below `parent`, once.

    `package` is the installed `pytriton` package. The folder is filled under another name and renamed, so one that
    has the final name is complete. The name changes with everything that goes into it, but not with the links that
    lead to the package. Every user can read the folder. Raises `ConditionError` if this user cannot make it.
    """
    triton = package / "tritonserver"
    stub = triton / "python_backend_stubs" / _dotted(python) / "triton_python_backend_stub"
    server = triton / "bin" / "tritonserver"
    for part in (stub, server):
        if not part.is_file():
            raise ConditionError(f"{DISTRIBUTION} {version}: expected {part}, found none: install it again")

    parts = f"{version} {_dotted(python)} {package.resolve()} {libpython}"
    folder = parent / f"layout-{version}-{hashlib.sha256(os.fsencode(parts)).hexdigest()[:12]}"
    if not folder.is_dir():
        parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished = Path(tempfile.mkdtemp(dir=parent, prefix="layout-unfinished-"))
        except PermissionError:
            raise ConditionError(
                f"{parent.resolve()}: expected the server's files, laid out by the owner of this environment, or "
                "leave to write there; found neither: the owner runs serve.sh once, or VENV names another folder"
            ) from None
        umask = os.umask(0o022)
        try:
            unfinished.chmod(0o755)  # mkdtemp makes it for its owner alone
            backend = unfinished / "backends" / "python"
            shutil.copytree(triton / "backends" / "python", backend, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(stub, backend)
            # A link and not libpython's own folder: conda's also holds a libstdc++ and a libssl of its own.
            (unfinished / "lib").mkdir()
            (unfinished / "lib" / libpython.name).symlink_to(libpython)
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another start was faster
                raise
        finally:
            os.umask(umask)
            shutil.rmtree(unfinished, ignore_errors=True)
    return Layout(
        server=server,
        backends=folder / "backends",
        library_folders=(package.parent / "nvidia_pytriton.libs", folder / "lib"),
    )


def server_environment(layout: Layout, environment: Mapping[str, str], venv_bin: Path) -> dict[str, str]:
    """The environment tritonserver needs, made from the caller's."""
    libraries = [str(folder) for folder in layout.library_folders]
    if inherited := environment.get("LD_LIBRARY_PATH"):
        libraries.append(inherited)
    return {
        "MALLOC_ARENA_MAX": "2",  # glibc's default, eight arenas per core, doubles the server's memory
        **environment,
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        # The stub embeds Python and finds site-packages through the first python3 on PATH, not through PYTHONPATH.
        "PATH": os.pathsep.join([str(venv_bin), environment.get("PATH", os.defpath)]),
    }


def docker_line(environment: Mapping[str, str]) -> str:
    """The command that serves the same model from Triton's container."""
    settings = ["RUNTIME=docker"]
    for setting in ("MODEL_PATH", "DEVICE"):
        if value := environment.get(f"NV_EMBED_{setting}"):
            settings.append(f"{setting}={shlex.quote(value)}")
    return " ".join([*settings, shlex.quote(str(Path(__file__).resolve().parent.parent / "serve.sh"))])


def main(arguments: Sequence[str]) -> NoReturn:
    """Becomes tritonserver with `arguments`, or exits with 2 and the condition that failed."""
    try:
        machine = Machine.here()
        libpython = check(machine)
        if list(arguments) == ["--check-only"]:
            raise SystemExit(0)
        layout = lay_out(*_installed_package(), machine.python, libpython, parent=Path(sys.prefix))
        if list(arguments) == ["--lay-out"]:
            raise SystemExit(0)
    except ConditionError as error:
        print(
            f"The pip-installed Triton cannot run here.\n  {error}\nDocker works instead:\n  {docker_line(os.environ)}",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    os.execve(
        layout.server,
        [str(layout.server), f"--backend-directory={layout.backends}", *arguments],
        server_environment(layout, os.environ, venv_bin=Path(sys.executable).parent),
    )


def _installed_package() -> tuple[Path, str]:
    """The folder and version of the installed `pytriton` package, without importing it: that takes seconds."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ConditionError(
            f"{DISTRIBUTION}: expected it in {sys.prefix}, found none: "
            "pip install -r tools/requirements.txt, which serve.sh does by itself"
        )
    return Path(spec.origin).parent, importlib.metadata.version(DISTRIBUTION)


def _glibc_version() -> tuple[int, ...] | None:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(map(int, version.split("."))) if name == "glibc" else None
    except (AttributeError, OSError, ValueError):  # macOS, Windows and musl have no such name
        return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


if __name__ == "__main__":
    main(sys.argv[1:])
