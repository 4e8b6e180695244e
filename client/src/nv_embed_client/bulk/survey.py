"""The plan of a job, from one look at every file of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from nv_embed_client.bulk import ids, source
from nv_embed_client.bulk.folder import Entry, Folder
from nv_embed_client.bulk.formats import format_of
from nv_embed_client.bulk.ids import NUM_SHARDS, Hashes
from nv_embed_client.bulk.plan import Plan, Wish
from nv_embed_client.bulk.source import Piece
from nv_embed_client.columns import ADDED, holds_strings
from nv_embed_client.errors import InvalidInput
from nv_embed_client.model_info import Identity

_FILES_AT_ONCE = 256  # tasks that Ray is given before the first are done


@dataclass(frozen=True, slots=True)
class _Seen:
    """Of one file."""

    pieces: tuple[Piece, ...]
    schema: Any


def planned(wish: Wish, model: Identity, files: tuple[Entry, ...]) -> Plan:
    """Look at all files, on all machines of the cluster.

    Raises:
        InvalidInput: the input is not what the caller says, or an id is there twice.
    """
    look = ray.remote(_look).options(num_returns=1 + NUM_SHARDS, num_cpus=0.5)
    seen: list[Any] = []
    shards: list[tuple[Any, ...]] = []
    for entry in files:
        first, *hashes = look.remote(wish, entry.name)
        seen.append(first)
        shards.append(tuple(hashes))
        if len(seen) >= _FILES_AT_ONCE:
            ray.wait([seen[-_FILES_AT_ONCE]])
    found: list[_Seen] = [_value_of(reference) for reference in seen]
    schema = source.unified(each.schema for each in found)
    _check_columns(schema, wish)
    if wish.id_column is not None:
        _check_ids(wish, files, shards)
    pieces = tuple(piece for each in found for piece in each.pieces)
    return Plan(wish, model, files, schema, pieces)


def _look(wish: Wish, name: str) -> tuple[Any, ...]:
    """What one file has: a `_Seen` or the error, and the hashes of its ids in each shard."""
    folder = Folder.at(wish.input)
    pieces: list[Piece] = []
    hashes: list[list[Hashes]] = [[] for _ in range(NUM_SHARDS)]
    try:
        schemas = [source.schema_of(folder, name)] if format_of(name) == "parquet" else []
        for piece, columns in source.pieces_of(folder, name, wish.rows_per_file):
            pieces.append(piece)
            if format_of(name) != "parquet":
                schemas.append(columns(None).schema)
            if wish.id_column is not None:
                _check_name(schemas[-1], "--id-column", wish.id_column)
                table = columns([wish.id_column])
                for shard, some in zip(hashes, ids.hashes_of(ids.ids_of(table, piece, wish.id_column)), strict=True):
                    shard.append(some)
        seen: Any = _Seen(tuple(pieces), source.unified(schemas))
    except InvalidInput as error:
        seen = error
    return (seen, *hashes)


def _check_name(schema: Any, option: str, name: str) -> None:
    if name not in schema.names:
        raise InvalidInput.of(
            expected=f"a column {name!r} in the input",
            got=", ".join(schema.names) or "none",
            remedy=f"name it with {option}",
        )


def _check_columns(schema: Any, wish: Wish) -> None:
    _check_name(schema, "--text-column", wish.text_column)
    if wish.id_column is not None:
        _check_name(schema, "--id-column", wish.id_column)
    kind = schema.field(wish.text_column).type
    if not holds_strings(kind):
        raise InvalidInput.of(
            expected=f"strings in the column {wish.text_column!r}", got=str(kind), remedy="name another column"
        )
    added = {*ADDED, *(() if wish.id_column else ("id",))} & {*schema.names}
    if added:
        raise InvalidInput.of(
            expected="an input without the columns that are added to it",
            got=", ".join(sorted(added)),
            remedy="rename them" + ("; if 'id' has ids, say --id-column id" if "id" in added else ""),
        )


def _check_ids(wish: Wish, files: tuple[Entry, ...], shards: list[tuple[Any, ...]]) -> None:
    assert wish.id_column is not None
    count = ray.remote(_repeated).options(num_cpus=0.5)
    counts = [count.remote(*(shard[number] for shard in shards)) for number in range(NUM_SHARDS)]
    suspicious = [hashes for hashes in ray.get(counts) if len(hashes)]
    if suspicious:
        look = ray.remote(_suspects).options(num_cpus=0.5)
        found = ray.get([look.remote(wish, entry.name, suspicious) for entry in files])
        ids.check_unique((id_ for some in found for id_ in some), wish.id_column)


def _repeated(*parts_of_shard: list[Hashes]) -> Hashes:
    return ids.repeated(*(hashes for some in parts_of_shard for hashes in some))


def _suspects(wish: Wish, name: str, suspicious: list[Hashes]) -> list[str]:
    """The ids of a file whose hashes are there more than once."""
    assert wish.id_column is not None
    found = []
    for piece, columns in source.pieces_of(Folder.at(wish.input), name, wish.rows_per_file):
        of_piece = ids.ids_of(columns([wish.id_column]), piece, wish.id_column)
        for hashes in suspicious:
            found += ids.with_hashes(of_piece, hashes)
    return found


def _value_of(reference: Any) -> _Seen:
    seen: _Seen | InvalidInput = ray.get(reference)
    if isinstance(seen, InvalidInput):
        raise seen
    return seen
