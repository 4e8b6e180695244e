"""Sequences to vectors: a model on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nv_embed.compute.compiled import compile_network, sample_sequences
from nv_embed.compute.devices import Computed, Device, NextBatch
from nv_embed.compute.packing import pack
from nv_embed.compute.pieces import nothing
from nv_embed.models.protocol import Model, Network, Work
from nv_embed.sequence import TokenSequence


class PackedModel:
    """A network of this project, filled."""

    def __init__(self, network: Network, device: torch.device, compile_layers: str = "off") -> None:
        """compile_layers: see `compile_network`; raises DeviceError."""
        self.network, self._device = network, device
        with torch.inference_mode():
            self.is_compiled = compile_network(network, compile_layers, device)

    @property
    def samples(self) -> list[TokenSequence]:
        """See `Model`."""
        return sample_sequences(self.network.vocab_size)

    def embed(self, sequences: Sequence[TokenSequence], work: Work) -> Tensor:
        """See `Model`."""
        vectors: Tensor = self.network(pack(sequences, self._device), work)
        return vectors


class Engine:
    """One model on one device, for any number of threads."""

    def __init__(self, model: Model, device: Device, dtype: str = "float32") -> None:
        """dtype: in which the model was loaded, as the setting names it."""
        self.model, self.dtype = model, dtype
        self._device = device

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device.torch_device

    def compute(self, next_batch: NextBatch, pause: Callable[[], None] = nothing) -> Computed | None:
        """Ask for the next batch when the device is about to be free, and compute it; None when there was none.

        On a CPU the batches of several threads are computed beside each other, on a GPU one after the other.

        Args:
            next_batch: called on this thread, exactly once; may block until there is work; returns None, or nothing,
                at the end.
            pause: called between pieces of the work on a device whose passes can take seconds, a CPU. It may compute
                another batch on the same thread by calling `compute` again. It may raise to give the pass up: what it
                raises comes out of here unchanged.

        Raises:
            OutOfDeviceMemory: the sequences do not fit together; fewer may.
            DeviceLost: the device is beyond use for this process.
        """
        return self._device.compute(next_batch, self.model.embed, pause)

    def embed(self, sequences: Sequence[TokenSequence]) -> npt.NDArray[np.float32]:
        """One batch: [len(sequences), dimension]; `sequences` are not empty."""
        computed = self.compute(lambda: sequences)
        assert computed is not None
        return computed.vectors
