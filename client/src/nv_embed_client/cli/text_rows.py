"""Rows of the formats that are text: lines, JSON lines, CSV."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from typing import BinaryIO, NoReturn

from nv_embed_client.cli.row import Row, check_column
from nv_embed_client.errors import InvalidInput

_MAX_CELL_CHARACTERS = 16 * 2**20  # so that a quote which nobody closes does not take the rest of a file into memory


def _decoded_lines(file: BinaryIO, path: str) -> Iterator[tuple[str, str | InvalidInput]]:
    """The place and the content of each line, without its end."""
    for number, line in enumerate(file, 1):
        if line == codecs.BOM_UTF8:  # alone: the file is empty
            continue
        try:
            text: str | InvalidInput = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            text = _not_utf8(f"line {number} of {path}: {error.reason}")
        yield f"line {number} of {path}", text


def lines(file: BinaryIO, path: str, text_column: str) -> Iterator[Row]:
    """A text on each line."""
    for place, text in _decoded_lines(file, path):
        yield Row(place, text, {} if isinstance(text, InvalidInput) else {text_column: text})


def json_lines(file: BinaryIO, path: str, text_column: str) -> Iterator[Row]:
    """A JSON string, or an object, on each line; blank lines are no rows."""
    for place, line in _decoded_lines(file, path):
        if isinstance(line, InvalidInput):
            yield Row(place, line, {})
            continue
        if not line.strip():
            continue
        try:
            value = json.loads(line, parse_constant=_no_constant)
            if "\\ud" in line.lower():  # an escaped surrogate, perhaps without its other half
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            yield Row(place, _half_a_pair(place), {})
            continue
        except (ValueError, RecursionError):
            value = None
        columns = value if isinstance(value, dict) else {text_column: value}
        text = columns.get(text_column)
        if isinstance(text, str):
            yield Row(place, text, columns)
            continue
        problem = InvalidInput.of(
            expected=f'a JSON string, or an object with a string "{text_column}", on each line',
            got=f"{line[:80]!r} on {place}",
            remedy="correct the line, or give a file of plain lines another name",
        )
        yield Row(place, problem, value if isinstance(value, dict) else {})


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def csv_rows(file: BinaryIO, path: str, text_column: str, delimiter: str) -> Iterator[Row]:
    """A header, and a row with as many cells on each line or, within quotes, on several."""
    # A byte that is not UTF-8 becomes half a surrogate pair, so that it spoils only its own row.
    lines = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    reader = csv.reader(lines, delimiter=delimiter)
    header = next(reader, [])
    check_column(text_column, header, path)
    while True:
        place = f"line {reader.line_num + 1} of {path}"
        try:
            cells = next(reader)
        except StopIteration:
            lines.detach()  # so that the file, which may be the standard input, stays open
            return
        except csv.Error as error:
            problem = InvalidInput.of(expected="a row of CSV", got=f"{error} on {place}", remedy="correct the line")
            yield Row(place, problem, {})
            continue
        if not cells:
            continue
        if len(cells) != len(header):
            problem = InvalidInput.of(
                expected=f"{len(header)} columns, as in the header", got=f"{len(cells)} on {place}",
                remedy="put a cell that contains the delimiter or a line break into quotes",
            )  # fmt: skip
            yield Row(place, problem, {})
            continue
        columns = dict(zip(header, cells, strict=True))
        try:
            "".join(cells).encode()
        except UnicodeEncodeError:
            yield Row(place, _not_utf8(place), {})
            continue
        yield Row(place, columns[text_column], columns)


def _not_utf8(where: str) -> InvalidInput:
    return InvalidInput.of(expected="UTF-8", got=where, remedy="convert the file with iconv")


def _half_a_pair(place: str) -> InvalidInput:
    return InvalidInput.of(
        expected="valid Unicode", got=f"an unpaired surrogate on {place}", remedy="repair the line, or take it out"
    )
