"""What a job is to do, fixed before its first text is embedded: every part of OUTPUT, by number, from which rows."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from nv_embed_client.bulk import ROWS_PER_FILE
from nv_embed_client.bulk.folder import Entry, Folder
from nv_embed_client.bulk.source import Piece
from nv_embed_client.embedding_type import EmbeddingType, packed
from nv_embed_client.errors import InvalidInput
from nv_embed_client.model_info import Identity

PLAN = "_plan.json"
SUCCESS = "_SUCCESS"
"""In OUTPUT once all is there."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a caller asks for. OUTPUT keeps it, and a later run must ask for the same."""

    input: str
    text_column: str = "text"
    id_column: str | None = None
    """Its values are unique. None: ids are made of a file's name and the row in it, in a column `id`."""
    embedding_type: EmbeddingType = "float"
    instruction: str | None = None
    rows_per_file: int = ROWS_PER_FILE


@dataclass(frozen=True, slots=True)
class Plan:
    """Of one OUTPUT."""

    wish: Wish
    model: Identity
    files: tuple[Entry, ...]
    schema: Any  # of the input, a pyarrow.Schema
    pieces: tuple[Piece, ...]  # the part of each number

    @property
    def num_rows(self) -> int:
        """Of the input."""
        return sum(piece.num_rows for piece in self.pieces)

    @property
    def width(self) -> int:
        """Numbers of a row's `embedding`: those of signs are bytes, of which the last may be partly used."""
        row = np.zeros((1, self.model.dimension), np.float32)
        width: int = packed(row, self.wish.embedding_type).shape[1]
        return width

    @property
    def id_column(self) -> str:
        """In OUTPUT."""
        return self.wish.id_column or "id"

    def check(self, wish: Wish, files: tuple[Entry, ...] | None, output: str) -> None:
        """
        Args:
            files: of the input as they are now; None does not compare them.

        Raises:
            InvalidInput: this plan is for something else.
        """
        for name, planned in asdict(self.wish).items():
            if planned != (asked := getattr(wish, name)):
                raise InvalidInput.of(
                    expected=f"{name} {planned!r}, with which {output} was begun",
                    got=repr(asked),
                    remedy="ask for the same, or choose another OUTPUT",
                )
        if files is not None and files != self.files:
            changed = sorted({entry.name for entry in {*files} ^ {*self.files}})
            raise InvalidInput.of(
                expected=f"the input as it was when {output} was begun",
                got=f"{len(changed)} new, changed or missing files, such as {changed[0]}",
                remedy="restore them, or choose another OUTPUT",
            )

    def write(self, folder: Folder) -> None:
        """Into OUTPUT."""
        told = asdict(self) | {"schema": base64.b64encode(self.schema.serialize().to_pybytes()).decode()}
        folder.write(PLAN, json.dumps(told, ensure_ascii=False).encode())

    @classmethod
    def read(cls, folder: Folder) -> Plan | None:
        """From OUTPUT; None if there is none."""
        content = folder.read(PLAN)
        if content is None:
            return None
        told = json.loads(content)
        return cls(
            Wish(**told["wish"]),
            Identity(**told["model"]),
            tuple(Entry(**each) for each in told["files"]),
            pa.ipc.read_schema(pa.py_buffer(base64.b64decode(told["schema"]))),
            tuple(Piece(**each) for each in told["pieces"]),
        )
