"""JSON lines, CSV and lines: where rows end, and tables of them."""

from __future__ import annotations

import codecs
import csv
import io
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.json

from nv_embed_client.bulk.formats import format_of, unreadable
from nv_embed_client.errors import InvalidInput

_MAX_PIECE_BYTES = 64 * 2**20  # long texts make short pieces


def header(stream: Any, name: str) -> tuple[list[str] | None, int]:
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


def cut(stream: Any, name: str, start: int, max_rows: int) -> Iterator[tuple[int, bytes]]:
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
        yield format_of(name) == "txt" or bool(line.strip()), start


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
        raise unreadable(name, f"{error}, before byte {end}") from None


def table(content: bytes, header: list[str] | None, name: str, first_row: int, schema: Any) -> Any:
    """The rows in some bytes of a file.

    Args:
        header: the names of CSV's columns, None for other formats.
        first_row: where they are in the file, for errors.
        schema: of JSON lines; None finds it in them.

    Raises:
        InvalidInput: they are not rows of that format.
    """
    if format_of(name) == "txt":
        lines = content.removeprefix(codecs.BOM_UTF8 if first_row == 0 else b"").split(b"\n")
        texts = [line.removesuffix(b"\r").decode() for line in (lines if lines[-1] else lines[:-1])]
        return pa.table({"text": pa.array(texts, pa.string())})
    if header is None:
        if not content.strip():
            return pa.table({})
        # One block, because an object must not cross two of them.
        read = pa.json.ReadOptions(use_threads=False, block_size=len(content) + 1)
        parse = pa.json.ParseOptions(explicit_schema=schema)
        rows = pa.json.read_json(io.BytesIO(content), read, parse)
        if schema is None and (plain := _as_written(rows.schema)) != rows.schema:
            return table(content, header, name, first_row, plain)
        return rows
    records = [fields for fields, _ in _records(io.BytesIO(content), name, 0) if fields]
    for number, fields in enumerate(records, first_row):
        if len(fields) != len(header):
            raise unreadable(name, f"{len(fields)} fields in row {number}, and {len(header)} names of columns")
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
