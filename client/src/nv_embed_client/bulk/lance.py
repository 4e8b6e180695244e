"""What a bulk job made, in a table of LanceDB."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import lancedb
import pyarrow as pa
import pyarrow.parquet
from tqdm.auto import tqdm

from nv_embed_client.bulk import parts
from nv_embed_client.bulk.folder import Folder
from nv_embed_client.bulk.plan import PLAN, SUCCESS
from nv_embed_client.disk_errors import as_os_errors
from nv_embed_client.errors import InvalidInput

DEFAULT_TABLE = "texts"
_TABLE_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # as LanceDB wants it
_ROWS_AT_ONCE = 2**16  # of one upsert, which looks through the ids of the table


@dataclass(frozen=True, slots=True)
class Loaded:
    """What one call did, and what is there now."""

    num_inserted: int
    num_updated: int
    num_rows: int  # of the table


def load(output: str, database: str, table_name: str = DEFAULT_TABLE, *, progress: bool = False) -> Loaded:
    """Put each row of a finished OUTPUT into a table of LanceDB, in place of one with the same id.

    Args:
        output: the folder or address that a bulk job filled.
        database: the folder or address of LanceDB; made if it is not there.
        table_name: made if it is not there.
        progress: show a bar.

    Raises:
        InvalidInput: OUTPUT is not finished, the table has vectors of something else or other columns, or another
            process loads into it.
    """
    if not _TABLE_NAME.fullmatch(table_name):
        raise InvalidInput.of(
            expected="letters, digits, '_', '-' and '.' as --table", got=repr(table_name), remedy="choose another name"
        )
    folder = Folder.at(output)
    if folder.read(SUCCESS) is None:
        raise InvalidInput.of(
            expected="the OUTPUT of a finished nv-embed bulk",
            got=f"{output!r}, which is not finished" if folder.read(PLAN) else f"{output!r}",
            remedy="run that again, until it ends with exit code 0",
        )
    names = [entry.name for entry in folder.entries() if entry.name.endswith(".parquet")]
    connection = lancedb.connect(database)
    table, counts = None, {"inserted": 0, "updated": 0}
    with (
        _alone(database, table_name),
        as_os_errors(),
        tqdm(total=json.loads(folder.read(SUCCESS) or b"")["num_rows"], unit=" rows", disable=not progress) as bar,
    ):
        for rows in _groups(folder, names):
            if table is None:
                table, is_new = _opened(connection, table_name, rows.schema, f"{table_name!r} in {database!r}")
            if is_new:  # ids of OUTPUT are unique, so that nothing has to be looked up
                table.add(rows)
                counts["inserted"] += len(rows)
            else:
                upsert = table.merge_insert(_told(rows.schema)["id_column"])
                done = upsert.when_matched_update_all().when_not_matched_insert_all().execute(rows)
                counts["inserted"] += done.num_inserted_rows
                counts["updated"] += done.num_updated_rows
            bar.update(len(rows))
    return Loaded(counts["inserted"], counts["updated"], 0 if table is None else table.count_rows())


@contextmanager
def _alone(database: str, table_name: str) -> Iterator[None]:
    """Nobody else loads into the table meanwhile: two upserts at once both insert an id that is new to each.

    An object store has no locks.
    """
    if "://" in database:
        yield
        return
    lock = filelock.FileLock(Path(database, f"{table_name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InvalidInput.of(
            expected=f"nobody else who loads into {table_name!r} in {database!r}", got="another nv-embed load",
            remedy="wait until it is done, and start again",
        ) from None  # fmt: skip
    try:
        yield
    finally:
        lock.release()


def _groups(folder: Folder, names: list[str]) -> Iterator[Any]:
    """The rows of all files, many at a time."""
    gathered: list[Any] = []
    for name in names:
        gathered.append(pa.parquet.read_table(io.BytesIO(folder.read(name) or b"")))
        if sum(map(len, gathered)) >= _ROWS_AT_ONCE or name == names[-1]:
            yield pa.concat_tables(gathered)
            gathered = []


def _opened(connection: Any, name: str, schema: Any, where: str) -> tuple[Any, bool]:
    """The table, and whether it is new.

    Raises:
        InvalidInput: its vectors are of something else, or its columns are others.
    """
    if name not in connection.table_names(limit=2**31 - 1):
        return connection.create_table(name, schema=schema), True
    table = connection.open_table(name)
    new, there = _told(schema), _told(table.schema)
    for key in ("fingerprint", "document_prompt", "embedding_type", "instruction", "id_column"):
        if there.get(key) != new[key]:
            raise InvalidInput.of(
                expected=f"{key} {there.get(key)!r}, which the vectors of {where} have",
                got=repr(new[key]),
                remedy="choose another --table",
            )
    if (new_columns := _columns(schema)) != (columns := _columns(table.schema)):
        name = next(name for name in columns | new_columns if columns.get(name) != new_columns.get(name))
        raise InvalidInput.of(
            expected=f"the columns of {where}, so {name!r} as {columns.get(name, 'no column')}",
            got=f"{new_columns.get(name, 'no column')}",
            remedy="choose another --table",
        )
    return table, False


def _columns(schema: Any) -> dict[str, Any]:
    """The type of each, as LanceDB has it."""
    return {field.name: pa.string() if pa.types.is_string_view(field.type) else field.type for field in schema}


def _told(schema: Any) -> dict[str, Any]:
    """Whose vectors these are; empty if nobody says so."""
    told: dict[str, Any] = json.loads((schema.metadata or {}).get(parts.METADATA, b"{}"))
    return told
