"""Where `nv-embed embed` writes: one class for each format; a row of the input is a row of the output in each."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
import orjson
from numpy.lib import format as npy

from nv_embed_client.cli.row import Rows
from nv_embed_client.columns import ADDED
from nv_embed_client.errors import InvalidInput
from nv_embed_client.extras import needs_extra
from nv_embed_client.outcome import Outcome

if TYPE_CHECKING:
    import pyarrow as pa
if sys.platform != "win32":
    import fcntl


class _Writer(Protocol):
    def write(self, rows: Rows, outcome: Outcome) -> None: ...

    def finish(self) -> None: ...


class Output:
    """A file that gets its name once all is written; until then, and after a failure, it is called NAME.partial.

    Used in a `with` block. A failure before the first row leaves nothing. `-` is the standard output, as JSON lines.
    """

    def __init__(self, path: str, width: int, dtype: np.dtype[Any], metadata: dict[str, str]) -> None:
        """
        Args:
            path: its suffix is the format: .npy, .jsonl or .parquet.
            width: numbers of an embedding.
            dtype: of these.
            metadata: about all rows, which Parquet keeps.

        Raises:
            InvalidInput: it cannot be written, or has another suffix, or another process writes it.
        """
        suffix = ".jsonl" if path == "-" else Path(path).suffix.lower()
        if suffix not in (".npy", ".jsonl", ".parquet"):
            raise InvalidInput.of(
                expected="a file to write that ends in .npy, .jsonl or .parquet, or '-'", got=repr(path),
                remedy="give another name with --out",
            )  # fmt: skip
        if suffix == ".parquet":
            with needs_extra("parquet"):
                import pyarrow.parquet  # noqa: F401 - before anything is made
        if os.path.isdir(path):
            raise InvalidInput.of(expected="a file to write", got=f"the folder {path!r}", remedy="change --out")
        self.path = path
        self.partial_path = partial_path_of(path)
        try:
            self._file: BinaryIO = sys.stdout.buffer if path == "-" else _opened_alone(self.partial_path)
        except OSError as error:
            raise InvalidInput.of(
                expected="a file that can be written",
                got=f"{path!r}: {error.strerror}",
                remedy="give another with --out",
            ) from None
        self.num_rows = 0
        self._writer: _Writer
        match suffix:
            case ".npy":
                self._writer = _Npy(self._file, width, dtype)
            case ".jsonl":
                self._writer = _JsonLines(self._file)
            case _:
                self._writer = _Parquet(self._file, metadata)

    def write(self, rows: Rows, outcome: Outcome) -> None:
        """Append the rows with what came of their texts."""
        self._writer.write(rows, outcome)
        self.num_rows += len(rows.texts)

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.path == "-":
            if error is None:
                self._file.flush()
            return
        with self._file:  # closed last, because until then no other process may write it
            self._writer.finish()  # also after a failure, so that what was written can be read
            self._file.flush()
            if sys.platform == "win32":
                self._file.close()  # there an open file cannot be renamed
            if error is None:
                os.replace(self.partial_path, self.path)
            elif not self.num_rows:
                os.unlink(self.partial_path)


def partial_path_of(path: str) -> str:
    """What an output is called until all is written."""
    return "-" if path == "-" else f"{path}.partial"


def _opened_alone(path: str) -> BinaryIO:
    """A new file, or an old one without its content, which no other process of this command writes meanwhile."""

    def opened(path: str, flags: int) -> int:
        return os.open(path, flags & ~os.O_TRUNC, 0o666)  # the content may be that of another process

    while True:
        file = open(path, "wb", opener=opened)  # noqa: SIM115
        try:
            if _is_locked_by_another(file):
                raise InvalidInput.of(
                    expected=f"nobody else who writes {path}", got="another nv-embed embed",
                    remedy="wait until it is done, or change --out",
                )  # fmt: skip
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()  # its writer gave it its name just now


def _is_locked_by_another(file: BinaryIO) -> bool:
    """If not, it is locked by this process, as far as the file system has locks."""
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
    return False


class _Npy:
    """The array alone: float32 [n, dim], or another type."""

    def __init__(self, file: BinaryIO, width: int, dtype: np.dtype[Any]) -> None:
        self._file = file
        self._width = width
        self._dtype = dtype
        self._num_rows = 0
        self._write_header()

    def write(self, rows: Rows, outcome: Outcome) -> None:
        self._file.write(outcome.embeddings.tobytes())
        self._num_rows += len(outcome.embeddings)

    def finish(self) -> None:
        self._write_header()

    def _write_header(self) -> None:
        """The header has room for any number of rows, so that the final one takes the place of the first."""
        self._file.seek(0)
        shape = (self._num_rows, self._width)
        described = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self._file, described)


class _JsonLines:
    """An object for each row: the input's columns, `embedding` (null if the text failed) and what came with it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, rows: Rows, outcome: Outcome) -> None:
        try:
            columns = rows.columns if isinstance(rows.columns, list) else rows.columns.to_pylist()
        except ValueError as error:  # nanoseconds, without pandas
            raise _no_json(str(error), rows.places[0]) from None
        vectors = np.ascontiguousarray(outcome.embeddings)
        for i, row in enumerate(columns):
            failed = i in outcome.errors
            record = row | {
                "embedding": None if failed else vectors[i],
                "num_tokens": None if failed else int(outcome.token_counts[i]),
                "is_truncated": None if failed else bool(outcome.is_truncated[i]),
            }
            self._file.write(_line(record, rows.places[i]))

    def finish(self) -> None:
        pass


def _line(record: dict[str, Any], place: str) -> bytes:
    try:
        return orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
    except TypeError as error:
        if (vector := record["embedding"]) is not None:
            record = record | {"embedding": vector.tolist()}
        try:  # this one is slow, and writes integers of any size and deep nesting
            return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError, RecursionError):
            raise _no_json(str(error), place) from None


def _no_json(problem: str, place: str) -> InvalidInput:
    return InvalidInput.of(
        expected="columns that JSON can hold",
        got=f"{problem} from {place} on",
        remedy="write Parquet: --out NAME.parquet",
    )


class _Parquet:
    """The input's columns, of the types that they had, and ours.

    The vector of a text that failed is NaN and not null, because older versions of pyarrow, such as 23, refuse null in
    lists of fixed size.
    """

    def __init__(self, file: BinaryIO, metadata: dict[str, str]) -> None:
        self._file = file
        self._metadata = metadata
        self._input_schema: pa.Schema | None = None
        self._writer: Any = None

    def write(self, rows: Rows, outcome: Outcome) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_batches([self._columns(rows)])
        failed = np.zeros(len(table), np.bool_)
        failed[list(outcome.errors)] = True
        numbers = pa.array(np.ascontiguousarray(outcome.embeddings).ravel())
        vectors = pa.FixedSizeListArray.from_arrays(numbers, outcome.embeddings.shape[1])
        for name, values in zip(
            ADDED,
            (vectors, pa.array(outcome.token_counts, mask=failed), pa.array(outcome.is_truncated, mask=failed)),
            strict=True,
        ):
            table = table.append_column(name, values)
        if self._writer is None:
            metadata = (self._input_schema.metadata if self._input_schema is not None else None) or {}
            kept = {name: value for name, value in metadata.items() if name != b"pandas"}  # which lists the columns
            self._schema = table.schema.with_metadata(kept | self._metadata)
            self._writer = pq.ParquetWriter(self._file, self._schema)
        self._writer.write_table(table.cast(self._schema))

    def finish(self) -> None:
        if self._writer is not None:  # else nothing was written, because of a failure
            self._writer.close()

    def _columns(self, rows: Rows) -> pa.RecordBatch:
        import pyarrow as pa

        if not isinstance(rows.columns, list):
            self._input_schema = rows.columns.schema
            return rows.columns
        names = list(dict.fromkeys(name for row in rows.columns for name in row))
        try:
            if self._input_schema is None:
                self._input_schema = pa.RecordBatch.from_pylist(
                    [{name: row.get(name) for name in names} for row in rows.columns]
                ).schema
            if unknown := set(names).difference(self._input_schema.names):
                raise pa.ArrowInvalid(f"{', '.join(map(repr, sorted(unknown)))}, which the first rows do not have")
            return pa.RecordBatch.from_pylist(rows.columns, schema=self._input_schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InvalidInput.of(
                expected="rows with columns of the same names and types, because Parquet needs that",
                got=f"{error} between {rows.places[0]} and {rows.places[-1]}",
                remedy="write JSON lines: --out NAME.jsonl",
            ) from None
