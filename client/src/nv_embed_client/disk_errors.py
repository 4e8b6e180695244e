"""What LanceDB says when a disk is full or a folder cannot be written, as Python's own error for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def as_os_errors() -> Iterator[None]:
    """Around writing to a table: its RuntimeError becomes an OSError, without the place in LanceDB's source."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).partition(", /")[0]) from error
