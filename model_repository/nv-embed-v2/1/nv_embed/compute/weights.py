"""safetensors to a filled `Network`, complete or not at all; knows files, but no model's names.

The checkpoint is memory-mapped and each tensor is copied once, to its place on the device: neither the host nor the
device ever holds the weights twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nv_embed.compute.precision import Rounding
from nv_embed.errors import CheckpointError
from nv_embed.models.protocol import Network
from nv_embed.models.shards import check_finite, listed, not_plain, opened

logger = logging.getLogger(__name__)


def checkpoint_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the network's checkpoint."""
    places = dict(network.places())
    for number in range(len(network.layers)):
        places.update(network.layer_places(number))
    return {name: tuple(place.shape) for name, place in places.items()} | network.folded_shapes()


def load_network(folder: Path, network: Network, device: torch.device, rounding: Rounding | None = None) -> None:
    """Fill a network on the meta device from a checkpoint folder; see `fill_network`.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors are; one report names those of each kind.
    """
    with opened(folder) as tensors:
        if all(name.startswith(network.optional_prefix) for name in tensors):
            tensors = {name.removeprefix(network.optional_prefix): source for name, source in tensors.items()}
        _check_complete(tensors, checkpoint_shapes(network))
        fill_network(network, tensors, device, rounding)


@torch.inference_mode()
def fill_network(
    network: Network,
    tensors: Mapping[str, Any],
    device: torch.device,
    rounding: Rounding | None = None,
    log_seconds: float = 5.0,
) -> None:
    """Give a network on the meta device its memory on `device`, then copy and fold published tensors into it, by name.

    `tensors`: anything that a slice or a tuple of slices makes a tensor of. Layers come last and one by one; with
    `rounding`, each is rounded before there is memory for the next. The log says every `log_seconds` how far it is.
    """

    def read(name: str, *where: slice) -> Tensor:
        tensor: Tensor = tensors[name][where or slice(None)]
        return _on_device(tensor, device).float()

    progress = _Progress(sum(parameter.nbytes for parameter in network.parameters()), log_seconds)
    network.to_empty(device=device, recurse=False)
    for child in network.children():
        if child is not network.layers:
            child.to_empty(device=device)
    for name, place in network.places():
        progress.copy(tensors[name], place)
        # Every text meets every number of the layers, so that warming up would fail. It does not meet every token.
        check_finite(name, place)
    network.fold(read)
    if rounding:
        rounding.begin()
    for number, layer in enumerate(network.layers):
        layer.to_empty(device=device)
        for name, place in network.layer_places(number):
            progress.copy(tensors[name], place)
        if rounding:
            rounding.round(layer)
    if rounding:
        rounding.check()
    num_bytes = sum(parameter.nbytes for parameter in network.parameters())
    logger.info("loaded %.2f GB of weights in %.1f s", num_bytes / 1e9, time.monotonic() - progress.started)


def _on_device(mapped: Tensor, device: torch.device) -> Tensor:
    """Through pinned memory, so that the file is read while what was read before is copied; numbers as they are."""
    return mapped.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else mapped


class _Progress:
    """Copies tensors, and says now and then how many."""

    def __init__(self, total_bytes: int, log_seconds: float) -> None:
        self.total_bytes, self.num_bytes, self.log_seconds = total_bytes, 0, log_seconds
        self.started = self._reported = time.monotonic()

    def copy(self, source: Any, place: Tensor) -> None:
        place.copy_(_on_device(source[:], place.device))
        self.num_bytes += place.nbytes
        if time.monotonic() - self._reported > self.log_seconds:
            self._reported = time.monotonic()
            logger.info("loading weights: %.1f of %.1f GB", self.num_bytes / 1e9, self.total_bytes / 1e9)


def _check_complete(tensors: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    found = {name: tuple(source.get_shape()) for name, source in tensors.items()}
    problems = (
        [f"missing {name} {list(expected[name])}" for name in expected if name not in found],
        [f"unexpected {name} {list(found[name])}" for name in found if name not in expected],
        [
            f"misshapen {name}: expected {list(shape)}, got {list(found[name])}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
        [
            f"unusable {name}: expected float16, bfloat16 or float32, got {kind}, whose scale is not known"
            for name, kind in not_plain(tensors).items()
            if name in expected
        ],
    )
    if any(problems):
        raise CheckpointError(
            f"the weights are not those config.json describes, {sum(map(len, problems))} tensors differ; take all "
            "files from the same checkpoint:\n  " + "\n  ".join(listed(lines, "\n  ") for lines in problems if lines)
        )
