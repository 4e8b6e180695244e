"""Texts in files, as subcommands read them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext

from nv_embed_client.errors import InvalidInput


def texts_of(path: str) -> Iterator[str]:
    """The texts of a file, one a line; empty lines are none.

    Args:
        path: `-` is the standard input. A file whose name ends in .jsonl has on each line a JSON string, or an object
            with the text as its "text": a text with line breaks needs that.

    Raises:
        InvalidInput: the file cannot be read, is not UTF-8, or has a line without a text.
    """
    try:
        with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text(line, path, number)
    except OSError as error:
        raise InvalidInput.of(
            expected="a file that can be read", got=f"{path!r}: {error.strerror}", remedy="correct the path"
        ) from None


def _text(line: bytes, path: str, number: int) -> str:
    try:
        text = line.decode().strip()
    except UnicodeDecodeError as error:
        raise InvalidInput.of(
            expected="UTF-8", got=f"line {number} of {path}: {error.reason}", remedy="convert the file with iconv"
        ) from None
    if not path.endswith(".jsonl"):
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if isinstance(value, dict):
        value = value.get("text")
    if not isinstance(value, str):
        raise InvalidInput.of(
            expected='a JSON string, or an object with a string "text", on each line',
            got=f"{text[:80]!r} on line {number} of {path}",
            remedy="correct the line, or give a file of plain lines another name",
        )
    return value
