"""Kinds of checkpoints, one file each, and how a folder's kind is recognized. A kind is imported when it is needed."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from nv_embed.models.config_file import Section, check_folder
from nv_embed.models.pipeline import mean_pooling

if TYPE_CHECKING:  # it imports torch
    from nv_embed.models.protocol import AnyCheckpoint

# Name of the file here, and of the class in it that reads such a folder.
_CLASSES = {
    "nv_embed": "NVEmbedCheckpoint",
    "nemotron": "NemotronCheckpoint",
    "sentence_transformers": "SentenceTransformersCheckpoint",
}


def kind_of(folder: Path) -> str:
    """Which file here knows a folder; needs no torch.

    Raises:
        CheckpointError: folder or file are missing or damaged, or describe a model that is not known here.
    """
    check_folder(folder)
    has_modules = (folder / "modules.json").is_file()
    if has_modules and not (folder / "config.json").is_file():  # which a table of token vectors does not need
        return "sentence_transformers"
    config = Section.of_folder(folder)
    if config.raw.get("model_type") == "nvembed":
        return "nv_embed"
    if config.raw.get("model_type") == "ministral3" and config.raw.get("is_causal") is False and mean_pooling(folder):
        return "nemotron"
    if has_modules:
        return "sentence_transformers"
    config.refuse("model_type", "'nvembed', or modules.json beside it, as sentence-transformers writes it")


def read_checkpoint(folder: Path) -> AnyCheckpoint:
    """Read a folder's configuration; raises CheckpointError."""
    kind = kind_of(folder)
    kind_class = getattr(import_module(f"{__name__}.{kind}"), _CLASSES[kind])
    return kind_class.of_folder(folder)  # type: ignore[no-any-return]
