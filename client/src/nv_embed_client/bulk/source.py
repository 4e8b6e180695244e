"""The files of a corpus, and the rows of one part of a file. Knows Parquet, JSON lines, CSV and lines, and neither ids
nor vectors."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet

from nv_embed_client.bulk import text_files
from nv_embed_client.bulk.folder import Entry, Folder
from nv_embed_client.bulk.formats import COMPRESSIONS, format_of, readable
from nv_embed_client.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one file that follow each other."""

    file: str
    start: int  # a row of Parquet, a byte of other formats, decompressed
    stop: int
    first_row: int  # within the file
    num_rows: int


Columns: TypeAlias = Callable[[Sequence[str] | None], Any]


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
    if len(formats) > 1 and "txt" in formats:  # beside other formats, it is a note about them
        formats.remove("txt")
        others += [entry for entry in files if format_of(entry.name) == "txt"]
        files = [entry for entry in files if format_of(entry.name) != "txt"]
    if len(formats) != 1:
        raise InvalidInput.of(
            expected="files of one format: .parquet, .jsonl, .csv or .txt, all but Parquet also as .gz, .bz2, .zst "
            "or .lz4",
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
        with readable(name), folder.open(name) as file:
            num_rows = pa.parquet.ParquetFile(file).metadata.num_rows
        for start in range(0, num_rows, max_rows):
            piece = Piece(name, start, min(start + max_rows, num_rows), start, min(max_rows, num_rows - start))
            yield piece, partial(_rows_of_parquet, folder, piece)
        return
    first_row = 0
    with readable(name), io.BufferedReader(folder.open_stream(name), 2**20) as stream:
        header, start = text_files.header(stream, name)
        for stop, content in text_files.cut(stream, name, start, max_rows):
            table = text_files.table(content, header, name, first_row, None)
            if table.num_rows:
                piece = Piece(name, start, stop, first_row, table.num_rows)
                yield piece, partial(_selected, table)
            start, first_row = stop, first_row + table.num_rows


def schema_of(folder: Folder, name: str) -> Any:
    """Of a Parquet file."""
    with readable(name), folder.open(name) as file:
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
    with readable(piece.file):
        if format_of(piece.file) == "parquet":
            table = _rows_of_parquet(folder, piece, None)
        else:
            with io.BufferedReader(folder.open_stream(piece.file), 2**20) as stream:
                header, _ = text_files.header(stream, piece.file)
            with _opened_at(folder, piece.file, piece.start) as stream:
                content = stream.read(piece.stop - piece.start)
            table = text_files.table(content, header, piece.file, piece.first_row, schema)
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


def texts_of(table: Any, column: str) -> list[str | None]:
    """The texts of a table, whatever the type that holds its strings; None where there is none."""
    texts: list[str | None] = table[column].to_pylist()
    return texts


def _opened_at(folder: Folder, name: str, start: int) -> Any:
    if name.endswith(COMPRESSIONS):
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
    with readable(piece.file), folder.open(piece.file) as opened:
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
