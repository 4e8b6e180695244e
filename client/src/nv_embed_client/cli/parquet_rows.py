"""Rows of Parquet. Needs the extra `[parquet]`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nv_embed_client.cli.row import Rows, check_column
from nv_embed_client.columns import holds_strings
from nv_embed_client.errors import InvalidInput
from nv_embed_client.extras import needs_extra

with needs_extra("parquet"):
    import pyarrow as pa
    import pyarrow.parquet as pq


def parquet_file(path: str) -> Any:
    """The open file.

    Raises:
        InvalidInput: it is not Parquet.
    """
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InvalidInput.of(
            expected="a Parquet file", got=f"{path!r}: {error}", remedy="give a file of another format another name"
        ) from None


def parquet_rows(path: str, text_column: str, max_rows: int) -> Iterator[Rows]:
    """The rows, at most `max_rows` at once, as Arrow has them."""
    file = parquet_file(path)
    schema = file.schema_arrow
    check_column(text_column, schema.names, path)
    kind = schema.field(text_column).type
    if not holds_strings(kind):
        raise InvalidInput.of(
            expected=f"strings in the column {text_column!r}", got=f"{kind} in {path}", remedy="use --text-column"
        )
    number = 0
    if not file.metadata.num_rows:
        yield Rows([], [], pa.RecordBatch.from_arrays([pa.array([], each.type) for each in schema], schema=schema))
    try:
        for batch in file.iter_batches(max_rows):
            places = [f"row {number + i} of {path}" for i in range(1, len(batch) + 1)]
            number += len(batch)
            texts = batch.column(text_column).to_pylist()
            named = zip(places, texts, strict=True)
            yield Rows(places, [_null(place) if text is None else text for place, text in named], batch)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise InvalidInput.of(
            expected="Parquet that can be read", got=f"{path} after row {number}: {error}", remedy="write it again"
        ) from None


def _null(place: str) -> InvalidInput:
    return InvalidInput.of(expected="a text", got=f"null on {place}", remedy="correct the row, or take it out")
