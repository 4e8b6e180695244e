"""The ids of a corpus: what they may be, and whether each is there once. No process holds all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from nv_embed_client.bulk.source import Piece
from nv_embed_client.errors import InvalidInput

NUM_SHARDS = 16  # of the hashes; 100 million ids are 50 MB in each

Hashes = npt.NDArray[np.uint64]


def ids_of(table: Any, piece: Piece, id_column: str | None) -> Any:
    """The ids of a piece's rows, an array of strings or integers: a column of it, or made of its place.

    Raises:
        InvalidInput: an id is missing, or is something else.
    """
    if id_column is None:
        return pa.array([f"{piece.file}:{piece.first_row + row}" for row in range(piece.num_rows)], pa.string())
    column = table[id_column].combine_chunks()
    kind = column.type
    if column.null_count:
        row = piece.first_row + column.is_null().index(pa.scalar(True)).as_py()
        raise InvalidInput.of(
            expected=f"an id in {id_column!r} of each row", got=f"none in row {row} of {piece.file}", remedy="add it"
        )
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InvalidInput.of(
            expected=f"strings or integers as ids in {id_column!r}", got=f"{kind} in {piece.file}", remedy="convert it"
        )
    return column


def hashes_of(ids: Any) -> list[Hashes]:
    """A number of 64 bits for each id, in `NUM_SHARDS` arrays; the same id is in the same array in every file."""
    # Strings, because a number in one file may be a string in another.
    hashes = pd.util.hash_array(np.array(ids.cast(pa.string()).to_pylist(), dtype=object), categorize=False)
    shards = hashes >> np.uint64(60)
    return [hashes[shards == shard] for shard in range(NUM_SHARDS)]


def repeated(*parts: Hashes) -> Hashes:
    """The hashes of one shard that are there more than once."""
    if not parts:
        return np.empty(0, np.uint64)
    values, counts = np.unique(np.concatenate(parts), return_counts=True)
    return values[counts > 1]


def with_hashes(ids: Any, hashes: Hashes) -> list[str]:
    """The ids that have one of these hashes, as strings."""
    strings = np.array(ids.cast(pa.string()).to_pylist(), dtype=object)
    found: list[str] = strings[np.isin(pd.util.hash_array(strings, categorize=False), hashes)].tolist()
    return found


def check_unique(suspects: Iterable[str], id_column: str) -> None:
    """
    Args:
        suspects: every id whose hash is there more than once. Different ids may have the same hash.

    Raises:
        InvalidInput: an id is there more than once.
    """
    counts = {id_: count for id_, count in Counter(suspects).items() if count > 1}
    if counts:
        shown = ", ".join(f"{id_!r} in {count} rows" for id_, count in list(counts.items())[:3])
        raise InvalidInput.of(
            expected=f"another id in {id_column!r} of each row",
            got=f"{len(counts)} ids in several rows: {shown}",
            remedy="make them different, or leave --id-column out and have ids made",
        )
