"""The weights in a folder: one safetensors file, or shards with an index. Knows no model's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nv_embed.errors import CheckpointError
from nv_embed.models.config_file import Section

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What stands for itself, as the files name it. Integers and floats of 8 bits and fewer would need a scale.
_PLAIN = ("F16", "BF16", "F32", "F64")
_MOST_NAMED = 20  # problems, or names


@contextmanager
def opened(folder: Path) -> Iterator[dict[str, Any]]:
    """Memory-map every shard; name -> unread slice. `safe_open` has no public type for a slice.

    Raises:
        CheckpointError: a file is missing or damaged.
        OSError: it may not be read.
    """
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for path in _shards(folder):
            path.open("rb").close()  # an OSError says what keeps this user from it; the library's do not
            try:
                shard = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path}: expected a complete safetensors file; got one of {path.stat().st_size} bytes that is cut "
                    f"short or damaged ({error}); download it again"
                ) from None
            tensors |= {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - no mapping
        yield tensors


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor, by name; raises as `opened` does."""
    with opened(folder) as tensors:
        return {name: tuple(source.get_shape()) for name, source in tensors.items()}


def _shards(folder: Path) -> list[Path]:
    whole, index = folder / _WHOLE, folder / _INDEX
    if not index.is_file():
        if whole.is_file():
            return [whole]
        pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        got, remedy = "neither", "model_path must hold the whole published checkpoint"
        if pickled:
            got, remedy = f"only {pickled[0]}", f"download {_WHOLE}, or write it with the library's save_pretrained"
        raise CheckpointError(f"{folder}: expected {_INDEX} and its shards, or {_WHOLE}; got {got}; {remedy}")
    names = sorted({str(name) for name in Section.of_file(index).section("weight_map").raw.values()})
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} shards missing: {', '.join(missing)}; download them"
        )
    return [folder / name for name in names]


def listed(lines: list[str], separator: str) -> str:
    """The first of many, and how many there are beside."""
    more = [f"... and {len(lines) - _MOST_NAMED} more"] if len(lines) > _MOST_NAMED else []
    return separator.join([*lines[:_MOST_NAMED], *more])


def not_plain(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Those of `opened` whose numbers do not stand for themselves, with their type."""
    return {name: kind for name, source in tensors.items() if (kind := source.get_dtype()) not in _PLAIN}


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError if a tensor has NaN or infinite numbers: most texts may never meet its row."""
    if tensor.numel() and not all(bound.isfinite() for bound in torch.aminmax(tensor)):
        row = int((~tensor.isfinite()).reshape(len(tensor), -1).any(dim=1).nonzero()[0]) if tensor.ndim else 0
        raise CheckpointError(
            f"expected finite numbers in the weights; got NaN or infinity in row {row} of {name}; download them again"
        )
