"""Rows of a file and the text of each, as subcommands read them; a file of any size, a part at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import PurePath
from typing import Literal, TypeAlias, get_args

from nv_embed_client.cli.row import Row, Rows
from nv_embed_client.cli.text_rows import csv_rows, json_lines, lines
from nv_embed_client.errors import InvalidInput

Format: TypeAlias = Literal["lines", "jsonl", "csv", "tsv", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
OF_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip

_MAX_ROWS = 1024  # of one part
_MAX_CHARACTERS = 4 * 2**20  # of the texts of one part, but for its last


def format_of(path: str) -> Format:
    """What a file's name says; other names, and `-`, are of files with a text on each line."""
    return OF_SUFFIXES.get(PurePath(path).suffix.lower(), "lines")


def rows_of(path: str, text_column: str = "text", format: Format | None = None) -> Iterator[Rows]:
    """The rows of a file, in order, in at least one part.

    Args:
        path: `-` is the standard input.
        text_column: where the texts are in CSV, Parquet, and the objects of JSON lines. Texts without a column of their
            own, as plain lines are, get it in `Rows.columns`.
        format: None: as the file's name says. "lines" has a text on each line, an empty one too. "jsonl" has on each
            line a JSON string or an object.

    Raises:
        InvalidInput: the file cannot be read, or lacks the column.
    """
    format = format or format_of(path)
    try:
        if format == "parquet":
            from nv_embed_client.cli.parquet_rows import parquet_rows

            yield from parquet_rows(path, text_column, _MAX_ROWS)
            return
        with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
            match format:
                case "lines":
                    rows = lines(file, path, text_column)
                case "jsonl":
                    rows = json_lines(file, path, text_column)
                case _:
                    rows = csv_rows(file, path, text_column, "\t" if format == "tsv" else ",")
            yield from _gathered(rows)
    except OSError as error:
        raise InvalidInput.of(
            expected="a file that can be read", got=f"{path!r}: {error.strerror or error}", remedy="correct the path"
        ) from None


def num_rows_of(path: str, format: Format | None = None) -> int | None:
    """About how many rows a file has, which a progress bar needs; None where only reading it all would tell."""
    format = format or format_of(path)
    if not os.path.isfile(path) or format in ("csv", "tsv"):  # a pipe can be read only once
        return None
    try:
        if format == "parquet":
            from nv_embed_client.cli.parquet_rows import parquet_file

            return int(parquet_file(path).metadata.num_rows)
        with open(path, "rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))
    except OSError:
        return None  # `rows_of` says why


def _gathered(rows: Iterable[Row]) -> Iterator[Rows]:
    part: list[Row] = []
    num_characters = num_parts = 0
    for row in rows:
        part.append(row)
        num_characters += len(row.text) if isinstance(row.text, str) else 0
        if len(part) >= _MAX_ROWS or num_characters >= _MAX_CHARACTERS:
            yield _together(part)
            part, num_characters, num_parts = [], 0, num_parts + 1
    if part or not num_parts:
        yield _together(part)


def _together(rows: list[Row]) -> Rows:
    return Rows([row.place for row in rows], [row.text for row in rows], [row.columns for row in rows])
