"""Kinds of checkpoints, one file each, and how a folder's kind is recognized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nv_embed.errors import CheckpointError
from nv_embed.models.config_file import Section
from nv_embed.models.nv_embed import NVEmbedCheckpoint
from nv_embed.models.protocol import Checkpoint

_KINDS: dict[str, Callable[[Section], Checkpoint]] = {"nvembed": NVEmbedCheckpoint.read}  # by model_type


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder's `config.json`.

    Raises:
        CheckpointError: folder or file are missing or damaged, or describe a model that is not known here.
    """
    config = Section.of_folder(folder)
    try:
        kind = config.raw.get("model_type")
        if not isinstance(kind, str) or kind not in _KINDS:
            config.refuse("model_type", " or ".join(map(repr, _KINDS)))
        return _KINDS[kind](config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
