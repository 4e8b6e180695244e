"""A row of a file, and what every format refuses in the same words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nv_embed_client.errors import InvalidInput

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Row:
    """One row; its fields are those of `Rows`."""

    place: str
    text: str | InvalidInput
    columns: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of a file."""

    places: list[str]
    """Where each is, in words: "line 3 of texts.txt"."""
    texts: list[str | InvalidInput]
    """Of each row, or why it has none."""
    columns: list[dict[str, Any]] | pa.RecordBatch
    """All that the file says of each row, its text included. Nothing of a row that cannot be read."""

    @property
    def names(self) -> set[str]:
        """Of all columns."""
        if isinstance(self.columns, list):
            return set().union(*self.columns)
        return set(self.columns.schema.names)


def check_column(text_column: str, names: list[str], path: str) -> None:
    """
    Raises:
        InvalidInput: there is no such column, or a name is there twice.
    """
    if len(set(names)) < len(names):
        raise InvalidInput.of(expected="columns with different names", got=f"{names} in {path}", remedy="rename some")
    if text_column not in names:
        raise InvalidInput.of(
            expected=f"a column {text_column!r}", got=f"{', '.join(map(repr, names)) or 'none'} in {path}",
            remedy="name the column of the texts with --text-column",
        )  # fmt: skip
