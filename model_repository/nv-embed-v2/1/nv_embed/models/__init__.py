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
_CLASSES = {"nv_embed": "NVEmbedCheckpoint", "nemotron": "NemotronCheckpoint"}


def kind_of(folder: Path) -> str:
    """Which file here knows a folder; needs no torch.

    Raises:
        CheckpointError: folder or file are missing or damaged, or describe a model that is not known here.
    """
    check_folder(folder)
    config = Section.of_folder(folder)
    if config.raw.get("model_type") == "nvembed":
        return "nv_embed"
    if config.raw.get("model_type") == "ministral3" and config.raw.get("is_causal") is False and mean_pooling(folder):
        return "nemotron"
    config.refuse(
        "model_type",
        "'nvembed', or 'ministral3' with is_causal false and, in modules.json, a Transformer and a mean Pooling",
    )


def read_checkpoint(folder: Path) -> AnyCheckpoint:
    """Read a folder's configuration; raises CheckpointError."""
    kind = kind_of(folder)
    kind_class = getattr(import_module(f"{__name__}.{kind}"), _CLASSES[kind])
    return kind_class.of_folder(folder)  # type: ignore[no-any-return]
