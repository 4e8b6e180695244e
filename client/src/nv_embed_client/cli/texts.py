"""Texts in files, as subcommands read them that need nothing else of a file, and texts among the arguments."""

from __future__ import annotations

import os
from collections.abc import Iterator

from nv_embed_client.cli.rows import rows_of
from nv_embed_client.errors import InvalidInput


def texts_of(path: str) -> Iterator[str]:
    """The texts of a file, as `rows_of` reads it, without the space around them; empty ones are left out.

    Raises:
        InvalidInput: the file cannot be read, or has a row without a text.
    """
    for rows in rows_of(path):
        for text in rows.texts:
            if isinstance(text, InvalidInput):
                raise text
            if text := text.strip():
                yield text


def text_argument(word: str) -> str:
    """An argument that is a text, which is UTF-8 whatever the locale; paths stay as the locale has them."""
    return os.fsencode(word).decode(errors="surrogateescape")
