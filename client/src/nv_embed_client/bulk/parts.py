"""The files of OUTPUT: Parquet with vectors, and beside it the texts that have none. Each is written whole or not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from nv_embed_client.bulk.folder import Folder
from nv_embed_client.bulk.ids import ids_of
from nv_embed_client.bulk.plan import Plan
from nv_embed_client.bulk.vectors import Vectors
from nv_embed_client.columns import ADDED, EMBEDDING

METADATA = b"nv_embed"
"""Of the Parquet files: whose vectors these are, as JSON."""
_READERS = 16  # threads that look at files


def name_of(number: int) -> str:
    """Of a part."""
    return f"part-{number:06d}.parquet"


def failed_name_of(number: int) -> str:
    """Of the list of a part's texts that have no vector."""
    return f"_failed/part-{number:06d}.jsonl"


def metadata_of(plan: Plan) -> dict[str, Any]:
    """What each file says about its vectors."""
    return asdict(plan.model) | {
        "embedding_type": plan.wish.embedding_type,
        "instruction": plan.wish.instruction,
        "id_column": plan.id_column,
    }


def write(folder: Folder, plan: Plan, number: int, table: Any, vectors: Vectors) -> None:
    """Write a part, from all rows of its piece. The file with the vectors comes last: with it the part is done."""
    ids = ids_of(table, plan.pieces[number], plan.wish.id_column)
    if vectors.reasons:
        lines = [{"id": ids[row].as_py(), "reason": reason} for row, reason in sorted(vectors.reasons.items())]
        folder.write(failed_name_of(number), "".join(json.dumps(line) + "\n" for line in lines).encode())
    else:
        folder.remove(failed_name_of(number))  # of a run that was killed right here
    if plan.wish.id_column is None:
        table = table.add_column(0, plan.id_column, ids)
    table = table.take(pa.array(vectors.rows))
    numbers = pa.array(vectors.embeddings.reshape(-1))
    for name, column in zip(
        ADDED,
        (
            pa.FixedSizeListArray.from_arrays(numbers, vectors.embeddings.shape[1]),
            pa.array(vectors.num_tokens),
            pa.array(vectors.is_truncated),
        ),
        strict=True,
    ):
        table = table.append_column(name, column)
    table = table.replace_schema_metadata({METADATA: json.dumps(metadata_of(plan))})
    sink = pa.BufferOutputStream()
    # Vectors look like noise: neither a dictionary nor compression makes them smaller.
    others = [name for name in table.column_names if name != EMBEDDING]
    leaf = f"{EMBEDDING}.list.element"
    codecs = {path: "none" if path == leaf else "zstd" for path in _leaves(table.schema)}
    pa.parquet.write_table(table, sink, use_dictionary=others, compression=codecs)
    folder.write(name_of(number), sink.getvalue().to_pybytes())


def num_rows_of(folder: Folder, number: int) -> int | None:
    """The rows of a part; None if it is not there, or is not whole."""
    try:
        with folder.open(name_of(number)) as file:
            rows: int = pa.parquet.read_metadata(file).num_rows
            return rows
    except (FileNotFoundError, pa.ArrowInvalid):  # a machine that lost power may leave a file without its end
        return None


def num_tokens_of(folder: Folder, number: int) -> int:
    """The tokens of a part that is there."""
    with folder.open(name_of(number)) as file:
        column = pa.parquet.ParquetFile(file).read(columns=["num_tokens"])["num_tokens"]
    return sum(column.to_pylist())


def finished(folder: Folder, numbers: Iterable[int]) -> dict[int, int]:
    """The rows of each part that is there, by its number."""
    with ThreadPoolExecutor(_READERS) as pool:
        numbers = list(numbers)
        rows = pool.map(lambda number: num_rows_of(folder, number), numbers)
        return {number: found for number, found in zip(numbers, rows, strict=True) if found is not None}


def _leaves(schema: Any) -> list[str]:
    """The paths of the columns as Parquet stores them."""
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(schema.empty_table(), sink)
    stored = pa.parquet.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [stored.column(number).path for number in range(len(stored))]
