"""The folders of a Triton model repository: what their config.pbtxt says, and new ones. Knows neither torch nor Triton.

Every model of this project runs the code of nv-embed-v2: the version folder `1` of another one is a link to it.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
DEFAULT = REPO / "model_repository" / "nv-embed-v2"
sys.path.insert(0, str(DEFAULT / "1"))  # for nv_embed

SERVED = REPO / ".served"  # repositories for models that were not added
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
NAME_IN_WORDS = "a letter or digit, then letters, digits and ._-, 100 characters at most"

_STRING = r'"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\''
_COMMENT = re.compile(rf"({_STRING})|#[^\n]*")
_PARAMETER = re.compile(rf"key\s*:\s*({_STRING})[\s,;]*value\s*:?\s*\{{\s*string_value\s*:\s*({_STRING})")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


class Refusal(Exception):
    """What is asked for is not done: the message has what was expected, what came, what to do."""


def parameters_of(folder: Path) -> dict[str, str]:
    """The parameters in a model's config.pbtxt; none if it has no such file."""
    try:
        text = (folder / "config.pbtxt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    text = _COMMENT.sub(r"\1", text)
    return {_unescaped(key): _unescaped(value) for key, value in _PARAMETER.findall(text)}


def config_of(name: str, source: Path = DEFAULT) -> str:
    """The config.pbtxt of a model, `source`, for one of another name."""
    text = (source / "config.pbtxt").read_text(encoding="utf-8")
    return re.sub(rf'^name: "{source.name}"', f'name: "{name}"', text, flags=re.M)


def config_with(name: str, parameters: Mapping[str, str]) -> str:
    """A config.pbtxt with these parameters alone."""
    head, mark, _ = config_of(name).partition("# Settings.")
    assert mark, "a comment before the parameters begins so"
    lines = [
        f'parameters {{ key: "{key}" value {{ string_value: "{_escaped(parameters[key])}" }} }}\n' for key in parameters
    ]
    return head.replace("# NV-Embed-v2 behind", "# A model behind") + "".join(
        ["# Settings that differ from the defaults, which docs/settings.md has.\n", *lines]
    )


def fill(folder: Path, config: str | bytes, code: str) -> None:
    """Make a model of an empty folder; `code` is where its link to the shared code leads."""
    (folder / "config.pbtxt").write_bytes(config if isinstance(config, bytes) else config.encode())
    (folder / "1").symlink_to(code)


@contextmanager
def made_at_once(folder: Path) -> Iterator[Path]:
    """An empty folder to be filled. It gets its name when it is complete, so nobody meets half of it.

    Raises:
        OSError: it cannot be made, or there is something of this name by then.
    """
    umask = os.umask(0o022)  # who adds a model is not always who serves it
    try:
        SERVED.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=SERVED, prefix="unfinished-") as parent:
            unfinished = Path(parent, folder.name)
            unfinished.mkdir()
            yield unfinished
            unfinished.rename(folder)
    finally:
        os.umask(umask)


def _escaped(value: str) -> str:
    """As a string of Protobuf's text format holds it."""
    value = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\{ord(found[0]):03o}", value)


def _unescaped(literal: str) -> str:
    """What a string of Protobuf's text format means: octal numbers are bytes of UTF-8."""

    def character(found: re.Match[str]) -> str:
        octal, other = found.groups()
        return bytes([int(octal, 8) & 255]).decode("latin-1") if octal else _ESCAPES.get(other, other)

    raw = literal[1:-1].encode("utf-8", "surrogateescape").decode("latin-1")
    text = re.sub(r"\\(?:([0-7]{1,3})|(.))", character, raw, flags=re.S)
    return text.encode("latin-1").decode("utf-8", "surrogateescape")
