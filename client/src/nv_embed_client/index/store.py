"""Passages and their vectors in a folder, a table of LanceDB; knows no server."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

from nv_embed_client.disk_errors import as_os_errors
from nv_embed_client.errors import InvalidInput
from nv_embed_client.extras import needs_extra
from nv_embed_client.index.part import Key, Part
from nv_embed_client.model_info import Identity, ModelInfo

with needs_extra("index"):
    import filelock
    import lancedb
    import pyarrow as pa

_TABLE = "passages"
_METADATA = b"nv_embed"  # in the metadata of the table's schema
_IDS_AT_ONCE = 1000
_OLD_VERSIONS_LIVE = timedelta(minutes=10)  # for a search that still reads one


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found."""

    score: float
    """Cosine of its vector and the query's."""
    file: str
    """Absolute."""
    line: int
    text: str


class Store:
    """The table in a folder."""

    def __init__(self, folder: str, model: ModelInfo) -> None:
        """
        Args:
            folder: made by `to_index`.
            model: whose vectors it holds.

        Raises:
            InvalidInput: there is no table, it cannot be read, or it holds another model's vectors.
        """
        self.folder = os.path.abspath(folder)
        self._root = os.path.dirname(self.folder)
        if not os.path.isdir(os.path.join(self.folder, f"{_TABLE}.lance")):
            loaded = _tables_of_load(self.folder)
            if loaded:
                raise InvalidInput.of(
                    expected="an index of nv-embed index",
                    got=f"the table {loaded[0]!r} of nv-embed load at {folder}",
                    remedy="search it with LanceDB, as docs/scale.md shows, or name another place with --store",
                )
            raise InvalidInput.of(
                expected="an index to search", got=f"none at {folder}",
                remedy="make one with nv-embed index FOLDER, or name its place with --store",
            )  # fmt: skip
        with _readable(folder):
            self._table = lancedb.connect(self.folder).open_table(_TABLE)
            kept = _identity_of(self._table.schema)
        kept.check(model.identity, folder)

    @classmethod
    @contextmanager
    def to_index(cls, folder: str, model: ModelInfo) -> Iterator[Store]:
        """The table, made if need be, which no other process changes meanwhile.

        Raises:
            InvalidInput: as for a table that is there; also if another process changes it, or it cannot be made.
        """
        try:
            if not os.path.isdir(folder):
                os.makedirs(folder)
                with open(os.path.join(folder, ".gitignore"), "w") as file:
                    file.write("*\n")  # it can be made again, and changes with each run
            lock = filelock.FileLock(os.path.join(folder, "lock"))
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise InvalidInput.of(
                expected=f"no other process that changes {folder}",
                got="another nv-embed index",
                remedy="wait until it is done",
            ) from None
        except OSError as error:
            raise InvalidInput.of(
                expected="a folder that can be made and changed", got=f"{folder!r}: {error.strerror}",
                remedy="change --store",
            ) from None  # fmt: skip
        try:
            with _readable(folder):
                database = lancedb.connect(folder)
                if not os.path.isdir(os.path.join(folder, f"{_TABLE}.lance")):
                    database.create_table(_TABLE, schema=_schema(model))
            yield cls(folder, model)
        finally:
            lock.release()

    def file_of(self, path: str) -> str:
        """The name here of a file with an absolute path."""
        return os.path.relpath(path, self._root).replace(os.sep, "/")

    def path_of(self, file: str) -> str:
        """The absolute path of a file with a name here."""
        return os.path.normpath(os.path.join(self._root, file))

    def keys(self) -> Iterator[Key]:
        """Of all passages; one with several parts comes several times."""
        columns = ["file", "passage_line", "passage_digest"]
        for batch in self._table.search().select(columns).to_batches():
            yield from map(Key, *(batch.column(name).to_pylist() for name in columns))

    def add(self, parts: Sequence[Part]) -> None:
        """Add parts, all of a passage at once; those that are there already are replaced."""
        parts = list({part.id: part for part in parts}.values())
        if not parts:
            return
        vectors = np.stack([part.vector for part in parts])
        table = pa.table(
            [
                [part.id for part in parts],
                [part.key.file for part in parts],
                pa.array([part.key.line for part in parts], pa.int32()),
                [part.key.digest for part in parts],
                pa.array([part.line for part in parts], pa.int32()),
                [part.text for part in parts],
                pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
            ],
            schema=self._table.schema,
        )
        with as_os_errors():
            self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(table)

    def copy(self, keys: Sequence[Key]) -> list[Key]:
        """Add passages whose text the store has at another place. Returns those that it does not have, after all."""
        missing: list[Key] = []
        for some in _slices(keys):
            found: dict[str, list[Part]] = {}
            for row in self._rows(f"passage_digest IN ({_quoted({key.digest for key in some})})"):
                key = Key(row["file"], row["passage_line"], row["passage_digest"])
                part = Part(key, row["line"], row["text"], np.array(row["vector"], np.float16))
                found.setdefault(key.digest, []).append(part)
            copies: list[Part] = []
            for key in some:
                parts = found.get(key.digest, [])
                copies += [
                    replace(part, key=key, line=part.line - part.key.line + key.line)
                    for part in parts
                    if part.key == parts[0].key
                ]
                if not parts:
                    missing.append(key)
            self.add(copies)
        return missing

    def remove(self, keys: Iterable[Key]) -> None:
        """Remove passages with all their parts."""
        for some in _slices([f"{key.file}:{key.line}:{key.digest}" for key in keys]):
            with as_os_errors():
                self._table.delete(f"concat(file, ':', passage_line, ':', passage_digest) IN ({_quoted(some)})")

    def tidy(self) -> None:
        """Merge what many small writes left, and forget versions that nobody reads any more."""
        with as_os_errors():
            self._table.optimize(cleanup_older_than=_OLD_VERSIONS_LIVE)

    def search(self, query: npt.NDArray[Any], top: int) -> list[Hit]:
        """The best passages, best first. Each vector is compared, so nothing is missed.

        Args:
            query: [dim], of length 1.
        """
        rows = (
            self._table.search(query.astype(np.float32), vector_column_name="vector")
            .distance_type("dot")
            .select(["file", "line", "text", "_distance"])
            .limit(top)
            .to_list()
        )
        return [Hit(1 - row["_distance"], self.path_of(row["file"]), row["line"], row["text"]) for row in rows]

    def _rows(self, condition: str) -> Iterator[dict[str, Any]]:
        for batch in self._table.search().where(condition).to_batches():
            yield from batch.to_pylist()


def _tables_of_load(folder: str) -> list[str]:
    """The names of the tables there whose vectors come from nv-embed bulk."""
    if not os.path.isdir(folder):
        return []
    with _readable(folder):
        database = lancedb.connect(folder)
        names = sorted(entry.removesuffix(".lance") for entry in os.listdir(folder) if entry.endswith(".lance"))
        return [name for name in names if _METADATA in (database.open_table(name).schema.metadata or {})]


@contextmanager
def _readable(folder: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise InvalidInput.of(
            expected=f"an index at {folder}", got=str(error), remedy="remove that folder and index again"
        ) from None


def _identity_of(schema: pa.Schema) -> Identity:
    told = json.loads((schema.metadata or {}).get(_METADATA, b"{}"))
    try:
        return Identity(**{each.name: told[each.name] for each in fields(Identity)})
    except KeyError:
        raise ValueError("a table that does not say whose vectors it holds") from None


def _schema(model: ModelInfo) -> pa.Schema:
    return pa.schema(
        [
            ("id", pa.string()),
            ("file", pa.string()),
            ("passage_line", pa.int32()),
            ("passage_digest", pa.string()),
            ("line", pa.int32()),
            ("text", pa.string()),
            ("vector", pa.list_(pa.float16(), model.dimension)),
        ],
        metadata={_METADATA: json.dumps(asdict(model.identity) | {"embedding_type": "float16"})},
    )


def _slices(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), _IDS_AT_ONCE):
        yield items[start : start + _IDS_AT_ONCE]


def _quoted(words: Iterable[str]) -> str:
    """As a list of SQL."""
    return ", ".join("'" + word.replace("'", "''") + "'" for word in words)
