"""What a file is by its name, and the error of one that is something else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from nv_embed_client.errors import InvalidInput

COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4")
_FORMATS = {"parquet": "parquet", "jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl", "csv": "csv", "txt": "txt"}


def format_of(name: str) -> str | None:
    """ "parquet", "jsonl", "csv" or "txt" by a file's name, None for any other."""
    stem, dot, suffix = name.rpartition(".")
    if dot + suffix in COMPRESSIONS:
        suffix = stem.rpartition(".")[2]
        return None if suffix == "parquet" else _FORMATS.get(suffix)
    return _FORMATS.get(suffix)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Around reading a file: an error that its content causes names it."""
    try:
        yield
    except InvalidInput:
        raise
    except (ValueError, OSError, pa.ArrowException) as error:
        raise unreadable(name, str(error)) from None


def unreadable(name: str, got: str) -> InvalidInput:
    return InvalidInput.of(
        expected=f"{format_of(name)} in {name}", got=got, remedy="repair the file, or take it out of the input"
    )
