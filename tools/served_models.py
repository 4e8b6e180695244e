"""Says which models a start serves, so that serve.sh prepares what they need.

    python tools/served_models.py MODEL_REPOSITORY MODEL_PATH NAME

MODEL_PATH: absolute, without links. NAME: what a checkpoint that is not NV-Embed-v2's would be called. Prints fields
that end with a NUL: the name of the model at MODEL_PATH, the folder that has the Triton repository in it and maybe more
that links in it lead to, the repository within that folder, MODEL_PATH's kind; then for each model that was added its
name, kind, device and checkpoint. The kind is empty if it is not known: the model says later what is wrong.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from model_folders import (
    DEFAULT,
    NAME,
    NAME_IN_WORDS,
    SERVED,
    Refusal,
    config_of,
    fill,
    made_at_once,
    parameters_of,
)
from nv_embed.errors import StartupError
from nv_embed.models import kind_of
from nv_embed.settings import DECLARED

UNUSED_SECONDS = 24 * 60 * 60


def known_kind(folder: str) -> str:
    """Empty if it is not known."""
    try:
        return kind_of(Path(folder))
    except (StartupError, OSError):
        return ""


def repository_of(name: str, repository: Path) -> Path:
    """A folder with `models`, a Triton repository that has `name` in place of nv-embed-v2 beside the models that were
    added, and `shared`, which leads to their own repository.

    Its name says what is in it, so it is never changed: starts at the same time, and a server that is started again,
    find what they expect, also when a model was removed meanwhile. Raises Refusal.
    """
    if not NAME.fullmatch(name):
        raise Refusal(
            f"expected a folder named as a model can be ({NAME_IN_WORDS}); got {name!r}; rename it, or give a link "
            "to it that has such a name"
        )
    if (repository / name).is_dir():
        raise Refusal(
            f"expected a folder named as no other model; got {name!r}; rename it, or remove {repository / name}"
        )
    source = repository / DEFAULT.name
    if not (source / "config.pbtxt").is_file():
        raise Refusal(f"expected its code and config.pbtxt in {source}; got no such file; correct MODEL_REPOSITORY")
    # What has no such file is no model, such as a file system's lost+found.
    try:
        others = {path.parent.name: path.read_bytes() for path in sorted(repository.glob("*/config.pbtxt"))}
    except OSError as error:
        raise Refusal(f"expected to read {error.filename}; got: {error.strerror}; correct its permissions") from None
    del others[DEFAULT.name]
    config = config_of(name, source)
    contents = repr((str(repository), others, config))
    folder = SERVED / f"{name}-{hashlib.sha256(contents.encode(errors='surrogateescape')).hexdigest()[:12]}"
    if folder.is_dir():
        with suppress(OSError):  # somebody else's
            os.utime(folder)
    if folder.is_dir():
        return folder
    try:
        with made_at_once(folder) as unfinished:
            (unfinished / "shared").symlink_to(repository)
            models = unfinished / "models"
            (models / name).mkdir(parents=True)
            fill(models / name, config, f"../../shared/{DEFAULT.name}/1")
            for other, content in others.items():
                if "model_path" in parameters_of(repository / other) and (repository / other / "1").is_symlink():
                    (models / other).mkdir()
                    fill(models / other, content, f"../../shared/{DEFAULT.name}/1")
                else:  # none that tools/add_model made
                    (models / other).symlink_to(f"../shared/{other}")
    except OSError as error:
        if not folder.is_dir():  # else another start was faster
            raise Refusal(
                f"expected to make {folder}; got: {error.strerror}; have the owner of {SERVED.parent} start this once"
            ) from None
    return folder


def remove_unused() -> None:
    """Remove repositories that no start has asked for in a day, and no server serves: serve.sh holds a lock on its own.

    Without the program flock there are no locks, so nothing is removed.
    """
    if not shutil.which("flock"):
        return
    for folder in SERVED.iterdir():
        with suppress(OSError):  # in use, somebody else's, or another start was faster
            if time.time() - folder.stat().st_mtime < UNUSED_SECONDS:
                continue
            place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with tempfile.TemporaryDirectory(dir=SERVED, prefix="unused-") as parent:
                    folder.rename(Path(parent, folder.name))  # nobody meets half of it
            finally:
                os.close(place)


def main() -> None:
    repository, model_path, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    kind = known_kind(model_path)
    try:
        if kind in ("nv_embed", ""):
            fields = [DEFAULT.name, str(repository), "", kind]
        else:
            fields = [name, str(repository_of(name, repository)), "/models", kind]
            remove_unused()
    except Refusal as error:
        sys.exit(f"serve.sh: MODEL_PATH: {error}.")
    for folder in sorted(repository.iterdir()):
        parameters = parameters_of(folder)
        if folder.name != DEFAULT.name and "model_path" in parameters:
            checkpoint = parameters["model_path"].strip()
            device = parameters.get("device", DECLARED["device"].default)
            fields += [folder.name, known_kind(checkpoint), device, checkpoint]
    sys.stdout.buffer.write(b"".join(field.encode(errors="surrogateescape") + b"\0" for field in fields))


if __name__ == "__main__":
    main()
