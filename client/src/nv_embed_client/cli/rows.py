"""Rows of a file and the text of each, as subcommands read them; a file of any size, a part at a time."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NoReturn, TypeAlias, get_args

from nv_embed_client.errors import InvalidInput
from nv_embed_client.extras import needs_extra

if TYPE_CHECKING:
    import pyarrow as pa

Format: TypeAlias = Literal["lines", "jsonl", "csv", "tsv", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)

_MAX_ROWS = 1024  # of one part
_MAX_CHARACTERS = 4 * 2**20  # of the texts of one part, but for its last
_MAX_CELL_CHARACTERS = 16 * 2**20  # so that a quote which nobody closes does not take the rest of a file into memory


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of a file."""

    places: list[str]
    """Where each is, in words: "line 3 of texts.txt"."""
    texts: list[str | InvalidInput]
    """Of each row, or why it has none."""
    columns: list[dict[str, Any]] | pa.RecordBatch
    """All that the file says of each row, its text included. Nothing of a row that cannot be read."""

    @property
    def names(self) -> set[str]:
        """Of all columns."""
        if isinstance(self.columns, list):
            return set().union(*self.columns)
        return set(self.columns.schema.names)


@dataclass(frozen=True, slots=True)
class _Row:
    place: str
    text: str | InvalidInput
    columns: dict[str, Any]


def format_of(path: str) -> Format:
    """What a file's name says; other names, and `-`, are of files with a text on each line."""
    suffix = PurePath(path).suffix.lower().removeprefix(".")
    return next((format for format in FORMATS if format == suffix), "lines")


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
            yield from _parquet(path, text_column)
            return
        with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
            match format:
                case "lines":
                    rows = _lines(file, path, text_column)
                case "jsonl":
                    rows = _json_lines(file, path, text_column)
                case _:
                    rows = _csv(file, path, text_column, "\t" if format == "tsv" else ",")
            yield from _gathered(rows)
    except OSError as error:
        raise InvalidInput.of(
            expected="a file that can be read", got=f"{path!r}: {error.strerror or error}", remedy="correct the path"
        ) from None


def num_rows_of(path: str, format: Format | None = None) -> int | None:
    """About how many rows a file has, for a progress bar; None where only reading it all would tell."""
    format = format or format_of(path)
    if not os.path.isfile(path) or format in ("csv", "tsv"):  # a pipe can be read only once
        return None
    try:
        if format == "parquet":
            return int(_parquet_file(path).metadata.num_rows)
        with open(path, "rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))
    except OSError:
        return None  # `rows_of` says why


def _gathered(rows: Iterable[_Row]) -> Iterator[Rows]:
    part: list[_Row] = []
    num_characters = num_parts = 0
    for row in rows:
        part.append(row)
        num_characters += len(row.text) if isinstance(row.text, str) else 0
        if len(part) >= _MAX_ROWS or num_characters >= _MAX_CHARACTERS:
            yield _together(part)
            part, num_characters, num_parts = [], 0, num_parts + 1
    if part or not num_parts:
        yield _together(part)


def _together(rows: list[_Row]) -> Rows:
    return Rows([row.place for row in rows], [row.text for row in rows], [row.columns for row in rows])


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


def _lines(file: BinaryIO, path: str, text_column: str) -> Iterator[_Row]:
    for place, text in _decoded_lines(file, path):
        yield _Row(place, text, {} if isinstance(text, InvalidInput) else {text_column: text})


def _json_lines(file: BinaryIO, path: str, text_column: str) -> Iterator[_Row]:
    for place, line in _decoded_lines(file, path):
        if isinstance(line, InvalidInput):
            yield _Row(place, line, {})
            continue
        if not line.strip():
            continue
        try:
            value = json.loads(line, parse_constant=_no_constant)
            if "\\ud" in line.lower():  # an escaped surrogate, perhaps without its other half
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            yield _Row(place, _half_a_pair(place), {})
            continue
        except (ValueError, RecursionError):
            value = None
        columns = value if isinstance(value, dict) else {text_column: value}
        text = columns.get(text_column)
        if isinstance(text, str):
            yield _Row(place, text, columns)
            continue
        problem = InvalidInput.of(
            expected=f'a JSON string, or an object with a string "{text_column}", on each line',
            got=f"{line[:80]!r} on {place}",
            remedy="correct the line, or give a file of plain lines another name",
        )
        yield _Row(place, problem, value if isinstance(value, dict) else {})


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _csv(file: BinaryIO, path: str, text_column: str, delimiter: str) -> Iterator[_Row]:
    # A byte that is not UTF-8 becomes half a surrogate pair, so that it spoils only its own row.
    lines = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    reader = csv.reader(lines, delimiter=delimiter)
    header = next(reader, [])
    if len(set(header)) < len(header):
        raise InvalidInput.of(
            expected="a header with different names of columns", got=f"{header} in {path}", remedy="rename some"
        )
    _check_column(text_column, header, path)
    while True:
        place = f"line {reader.line_num + 1} of {path}"
        try:
            cells = next(reader)
        except StopIteration:
            lines.detach()  # so that the file, which may be the standard input, stays open
            return
        except csv.Error as error:
            problem = InvalidInput.of(expected="a row of CSV", got=f"{error} on {place}", remedy="correct the line")
            yield _Row(place, problem, {})
            continue
        if not cells:
            continue
        if len(cells) != len(header):
            problem = InvalidInput.of(
                expected=f"{len(header)} columns, as in the header", got=f"{len(cells)} on {place}",
                remedy="put a cell that contains the delimiter or a line break into quotes",
            )  # fmt: skip
            yield _Row(place, problem, {})
            continue
        columns = dict(zip(header, cells, strict=True))
        try:
            "".join(cells).encode()
        except UnicodeEncodeError:
            yield _Row(place, _not_utf8(place), {})
            continue
        yield _Row(place, columns[text_column], columns)


def _parquet_file(path: str) -> Any:
    with needs_extra("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InvalidInput.of(
            expected="a Parquet file", got=f"{path!r}: {error}", remedy="give a file of another format another name"
        ) from None


def _parquet(path: str, text_column: str) -> Iterator[Rows]:
    file = _parquet_file(path)
    import pyarrow as pa

    schema = file.schema_arrow
    _check_column(text_column, schema.names, path)
    kind = schema.field(text_column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise InvalidInput.of(
            expected=f"strings in the column {text_column!r}", got=f"{kind} in {path}", remedy="use --text-column"
        )
    number = 0
    if not file.metadata.num_rows:
        yield Rows([], [], pa.RecordBatch.from_arrays([pa.array([], each.type) for each in schema], schema=schema))
    try:
        for batch in file.iter_batches(_MAX_ROWS):
            places = [f"row {number + i} of {path}" for i in range(1, len(batch) + 1)]
            number += len(batch)
            texts = batch.column(text_column).to_pylist()
            named = zip(places, texts, strict=True)
            yield Rows(places, [_null(place) if text is None else text for place, text in named], batch)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise InvalidInput.of(
            expected="Parquet that can be read", got=f"{path} after row {number}: {error}", remedy="write it anew"
        ) from None


def _check_column(text_column: str, names: list[str], path: str) -> None:
    if text_column not in names:
        raise InvalidInput.of(
            expected=f"a column {text_column!r}", got=f"{', '.join(map(repr, names)) or 'none'} in {path}",
            remedy="name the column of the texts with --text-column",
        )  # fmt: skip


def _null(place: str) -> InvalidInput:
    return InvalidInput.of(expected="a text", got=f"null on {place}", remedy="correct the row, or take it out")


def _not_utf8(where: str) -> InvalidInput:
    return InvalidInput.of(expected="UTF-8", got=where, remedy="convert the file with iconv")


def _half_a_pair(place: str) -> InvalidInput:
    return InvalidInput.of(
        expected="valid Unicode", got=f"an unpaired surrogate on {place}", remedy="repair the line, or take it out"
    )
