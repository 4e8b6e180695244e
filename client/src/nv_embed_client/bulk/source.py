"""The files of a corpus, and the rows of one part of a file. Knows Parquet, JSON lines and CSV, and neither ids nor
vectors."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from nv_embed_client.bulk.folder import Entry, Folder
from nv_embed_client.errors import InvalidInput

_FORMATS = {"parquet": "parquet", "jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl", "csv": "csv"}
_COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4")
_MAX_PIECE_BYTES = 64 * 2**20  # of text files: long texts make short pieces


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one file that follow each other."""

    file: str
    start: int  # a row of Parquet, a byte of other formats, decompressed
    stop: int
    first_row: int  # within the file
    num_rows: int


Columns: TypeAlias = Callable[[Sequence[str] | None], Any]


def format_of(name: str) -> str | None:
    """ "parquet", "jsonl" or "csv" by a file's name, None for any other."""
    stem, dot, suffix = name.rpartition(".")
    if dot + suffix in _COMPRESSIONS:
        suffix = stem.rpartition(".")[2]
        return None if suffix == "parquet" else _FORMATS.get(suffix)
    return _FORMATS.get(suffix)


def corpus_of(folder: Folder, address: str) -> tuple[list[Entry], list[Entry]]:
    """The files of a corpus, and those that are left out because their names are of no format.

    Raises:
        InvalidInput: there is none, or they are of several formats.
    """
    files: list[Entry] = []
    others: list[Entry] = []
    for entry in folder.entries():
        (others if format_of(entry.name) is None else files).append(entry)
    formats = sorted({str(format_of(entry.name)) for entry in files})
    if len(formats) != 1:
        raise InvalidInput.of(
            expected="files of one format: .parquet, .jsonl or .csv, the last two also as .gz, .bz2, .zst or .lz4",
            got=f"{' and '.join(formats) or 'none'} at {address!r}",
            remedy="give the folder or the file that has them",
        )
    return files, others


def pieces_of(folder: Folder, name: str, max_rows: int) -> Iterator[tuple[Piece, Columns]]:
    """A file cut into pieces, each with a function that gives its rows, with the columns of these names or with all.

    The cuts depend on the file and on `max_rows` alone.

    Raises:
        InvalidInput: the file is not what its name says.
    """
    if format_of(name) == "parquet":
        with _readable(name), folder.open(name) as file:
            num_rows = pa.parquet.ParquetFile(file).metadata.num_rows
        for start in range(0, num_rows, max_rows):
            piece = Piece(name, start, min(start + max_rows, num_rows), start, min(max_rows, num_rows - start))
            yield piece, partial(_rows_of_parquet, folder, piece)
        return
    first_row = 0
    with _readable(name), io.BufferedReader(folder.open_stream(name), 2**20) as stream:
        header, start = _header(stream, name)
        for stop, content in _cut(stream, name, start, max_rows):
            table = _table(content, header, name, first_row, None)
            if table.num_rows:
                piece = Piece(name, start, stop, first_row, table.num_rows)
                yield piece, partial(_selected, table)
            start, first_row = stop, first_row + table.num_rows


def schema_of(folder: Folder, name: str) -> Any:
    """Of a Parquet file."""
    with _readable(name), folder.open(name) as file:
        schema = pa.parquet.read_schema(file).remove_metadata()
    if len(set(schema.names)) < len(schema.names):
        raise InvalidInput.of(
            expected="different names of columns", got=f"{schema.names} in {name}", remedy="rename one"
        )
    return schema


def unified(schemas: Iterable[Any]) -> Any:
    """One schema for all files.

    Raises:
        InvalidInput: a column has types that cannot be one.
    """
    several = list(schemas)
    if not several:  # of an empty file
        return pa.schema([])
    try:
        return pa.unify_schemas(several, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InvalidInput.of(
            expected="files whose columns have the same types", got=str(error), remedy="convert them"
        ) from None


def rows_of(folder: Folder, piece: Piece, schema: Any) -> Any:
    """The rows of a piece as a table of this schema.

    Raises:
        InvalidInput: the file has changed since it was cut.
    """
    with _readable(piece.file):
        if format_of(piece.file) == "parquet":
            table = _rows_of_parquet(folder, piece, None)
        else:
            with io.BufferedReader(folder.open_stream(piece.file), 2**20) as stream:
                header, _ = _header(stream, piece.file)
            with _opened_at(folder, piece.file, piece.start) as stream:
                content = stream.read(piece.stop - piece.start)
            table = _table(content, header, piece.file, piece.first_row, schema)
        if table.num_rows != piece.num_rows:
            raise InvalidInput.of(
                expected=f"{piece.num_rows} rows from row {piece.first_row} of {piece.file}",
                got=str(table.num_rows),
                remedy="leave the input as it is until the job is finished",
            )
        columns = [
            table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
            for field in schema
        ]
        return pa.table(columns, schema=schema)


def _opened_at(folder: Folder, name: str, start: int) -> Any:
    if name.endswith(_COMPRESSIONS):
        stream = io.BufferedReader(folder.open_stream(name), 2**20)
        while start:  # a compressed file can only be read from its front
            start -= len(stream.read(min(start, 2**24))) or start
        return stream
    file = folder.open(name)
    file.seek(start)
    return file


def _selected(table: Any, columns: Sequence[str] | None) -> Any:
    return table if columns is None else table.select(columns)


def _rows_of_parquet(folder: Folder, piece: Piece, columns: Sequence[str] | None) -> Any:
    with _readable(piece.file), folder.open(piece.file) as opened:
        file = pa.parquet.ParquetFile(opened)
        groups: list[int] = []
        at, end = 0, 0  # at: the first row of what is read
        for number in range(file.metadata.num_row_groups):
            first, end = end, end + file.metadata.row_group(number).num_rows
            if first < piece.stop and end > piece.start:
                at = at if groups else first
                groups.append(number)
        batches = []
        for batch in file.iter_batches(batch_size=2**12, row_groups=groups, columns=columns):
            skip = min(max(piece.start - at, 0), len(batch))
            batches.append(batch.slice(skip, piece.stop - at - skip))
            at += len(batch)
            if at >= piece.stop:
                break
        return pa.Table.from_batches(batches)


def _header(stream: Any, name: str) -> tuple[list[str] | None, int]:
    """The names of CSV's columns, and where the rows begin."""
    if format_of(name) != "csv":
        return None, 0
    for fields, end in _records(stream, name, 0):
        header = [fields[0].removeprefix("\ufeff"), *fields[1:]]
        if len(set(header)) < len(header):
            raise InvalidInput.of(
                expected="different names of columns in the first line", got=f"{header} in {name}", remedy="rename one"
            )
        return header, end
    raise InvalidInput.of(expected="names of columns in the first line", got=f"nothing in {name}", remedy="add them")


def _cut(stream: Any, name: str, start: int, max_rows: int) -> Iterator[tuple[int, bytes]]:
    """(where it ends, its bytes) of one piece after the other."""
    taken: list[bytes] = []
    num_rows, end = 0, start

    def remembered() -> Iterator[bytes]:
        for line in stream:
            taken.append(line)
            yield line

    for is_row, after in _row_ends(remembered(), name, start):
        num_rows, end = num_rows + is_row, after
        if num_rows >= max_rows or end - start >= _MAX_PIECE_BYTES:
            yield end, b"".join(taken)
            taken.clear()
            start, num_rows = end, 0
    if taken:
        yield end, b"".join(taken)


def _row_ends(lines: Iterator[bytes], name: str, start: int) -> Iterator[tuple[bool, int]]:
    if format_of(name) == "csv":
        for fields, end in _records(lines, name, start):
            yield bool(fields), end
        return
    for line in lines:
        start += len(line)
        yield bool(line.strip()), start


def _records(lines: Iterable[bytes], name: str, start: int) -> Iterator[tuple[list[str], int]]:
    """The fields of each record of CSV, and the byte at which it ends. A field may hold line breaks."""
    csv.field_size_limit(sys.maxsize)  # its default is shorter than a long text
    end = start

    def decoded() -> Iterator[str]:
        nonlocal end
        for line in lines:
            end += len(line)
            yield line.decode()

    try:
        for fields in csv.reader(decoded(), strict=True):
            yield fields, end
    except csv.Error as error:
        raise _unreadable(name, f"{error}, before byte {end}") from None


def _table(content: bytes, header: list[str] | None, name: str, first_row: int, schema: Any) -> Any:
    if header is None:
        if not content.strip():
            return pa.table({})
        # One block, because an object must not cross two of them.
        read = pa.json.ReadOptions(use_threads=False, block_size=len(content) + 1)
        parse = pa.json.ParseOptions(explicit_schema=schema)
        table = pa.json.read_json(io.BytesIO(content), read, parse)
        if schema is None and (plain := _as_written(table.schema)) != table.schema:
            return _table(content, header, name, first_row, plain)
        return table
    records = [fields for fields, _ in _records(io.BytesIO(content), name, 0) if fields]
    for number, fields in enumerate(records, first_row):
        if len(fields) != len(header):
            raise _unreadable(name, f"{len(fields)} fields in row {number}, and {len(header)} names of columns")
    columns = zip(*records, strict=True) if records else [[] for _ in header]
    # CSV has no types, so that "007" stays what it is.
    return pa.table([pa.array(column, pa.string()) for column in columns], names=header)


def _as_written(schema: Any) -> Any:
    """Without the timestamps that pyarrow sees in strings, because JSON has none."""

    def plain(type_: Any) -> Any:
        if pa.types.is_timestamp(type_):
            return pa.string()
        if pa.types.is_list(type_):
            return pa.list_(plain(type_.value_type))
        if pa.types.is_struct(type_):
            return pa.struct([pa.field(field.name, plain(field.type)) for field in type_])
        return type_

    return pa.schema([pa.field(field.name, plain(field.type)) for field in schema])


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Around reading a file: an error that its content causes names it."""
    try:
        yield
    except InvalidInput:
        raise
    except (ValueError, OSError, pa.ArrowException) as error:
        raise _unreadable(name, str(error)) from None


def _unreadable(name: str, got: str) -> InvalidInput:
    return InvalidInput.of(
        expected=f"{format_of(name)} in {name}", got=got, remedy="repair the file, or take it out of the input"
    )
