"""What the layers' matrices are stored and multiplied in; the only file that knows 8-bit numbers.

An 8-bit matrix has one scale for each of its outputs. The rest of the network, 5 % of the published one, keeps the
precision it computes in: token vectors, norms and the pooling head. What rounding does to vectors is found at every
start, with the sample texts that stand here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from nv_embed.compute.packing import pack
from nv_embed.compute.pieces import Whole
from nv_embed.errors import DeviceError, in_short
from nv_embed.models.protocol import AnyCheckpoint, Checkpoint, Matrix, Network
from nv_embed.sequence import TokenSequence

logger = logging.getLogger(__name__)

# Short and long, plain and not.
SAMPLES = (
    "Water boils at a lower temperature on a mountain, where the air presses less.",
    "How do I cancel my subscription?",
    "The committee met on 14 March 2019; of its 27 members, 19 voted for the proposal, 6 against, and 2 abstained.",
    "def area(radius: float) -> float:\n    return math.pi * radius**2",
    "Das Fahrrad lehnt am Zaun. La bicicleta está apoyada en la valla.",
    "She had not meant to stay. But the rain grew heavier, the last bus had gone, and the old man behind the counter "
    "had already put a second cup on the table, so she took off her coat, sat down by the window and began, for want "
    "of anything better, to tell him why she had come.",
)
SAMPLE_TOKENS = 512  # more than any sample has
_OLDEST_FLOAT8 = (8, 9)  # capability of the first GPUs that multiply it: Ada
_FLOAT8 = torch.float8_e4m3fn


class Int8Matrix(nn.Module):
    """Stored as int8, multiplied in the precision of its input: half the memory of half precision, on any device."""

    # Of a text's vector to the one before rounding. The published width and depth with random weights come to 0.999, in
    # float8 to 0.989: a limit above that would refuse rounding itself.
    least_cosine = 0.99

    def __init__(self, weight: Tensor) -> None:
        """weight: [outputs, inputs] in the precision to compute in."""
        super().__init__()
        rounded, scale = _scaled(weight, 127.0)
        self.weight = nn.Parameter(rounded.round_().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale.to(weight.dtype), requires_grad=False)  # [outputs, 1]

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, inputs] to [T, outputs]."""
        return functional.linear(x, self.weight * self.scale)


class Float8Matrix(nn.Module):
    """Stored and multiplied in float8 (e4m3); each row of the input is scaled and rounded as it comes."""

    least_cosine = 0.98

    def __init__(self, weight: Tensor) -> None:
        """weight: [outputs, inputs]."""
        super().__init__()
        rounded, scale = _scaled(weight, torch.finfo(_FLOAT8).max)
        self.weight = nn.Parameter(rounded.to(_FLOAT8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)  # [outputs, 1] float32

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, inputs] bfloat16 to [T, outputs]."""
        rounded, scale = _scaled(x, torch.finfo(_FLOAT8).max)
        # Not functional.scaled_mm, the same by its public name: torch 2.11 cannot compile that.
        product: Tensor = torch._scaled_mm(
            rounded.to(_FLOAT8), self.weight.t(), scale, self.scale.t(), out_dtype=x.dtype,
            use_fast_accum=True,  # fewer bits, as is usual where nothing is trained
        )  # fmt: skip
        return product


def least_cosine_of_repeats(network: Network) -> float:
    """Of a vector to the same one computed by other kernels, which round elsewhere."""
    # An input between two of the few numbers of float8 may go to either.
    return 0.98 if any(isinstance(module, Float8Matrix) for module in network.modules()) else 0.999


def _scaled(rows: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Each row stretched to `largest`, and what it must be multiplied by to be itself again: float32 both."""
    scale = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    scale = scale.clamp(min=1e-12) / largest
    return rows / scale, scale


@dataclass(frozen=True, slots=True)
class Precision:
    """What `dtype` comes to on one device."""

    name: str
    dtype: torch.dtype  # of all that is computed, and of all that is stored but the layers' matrices
    matrix: type[Int8Matrix] | type[Float8Matrix] | None = None  # of those; None: as the rest

    @classmethod
    def choose(cls, name: str, device: torch.device, checkpoint: AnyCheckpoint) -> Precision:
        """The precision of a name: 'float16', 'bfloat16', 'float32', 'int8', 'float8' or 'auto'.

        Raises:
            DeviceError: the device does not multiply float8.
        """
        usual = "float32" if device.type == "cpu" else checkpoint.dtype
        if name == "int8":
            return cls(name, getattr(torch, usual), Int8Matrix)
        if name == "float8":
            if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < _OLDEST_FLOAT8:
                raise DeviceError(
                    f"dtype: float8 needs a GPU of compute capability 8.9 or later; got {device} of "
                    f"{'.'.join(map(str, capability))}; set dtype to 'int8' or 'auto'"
                )
            return cls(name, torch.bfloat16, Float8Matrix)  # in which every kernel can return its product
        name = usual if name == "auto" else name
        return cls(name, getattr(torch, name))

    def num_bytes(self, network: Network) -> int:
        """What a network's weights take, while they are loaded."""
        num_bytes = sum(parameter.numel() for parameter in network.parameters()) * self.dtype.itemsize
        if self.matrix:
            saved = [
                sum(matrix.weight.numel() for matrix in layer.children() if isinstance(matrix, Matrix))
                * (self.dtype.itemsize - 1)
                for layer in network.layers
            ]
            num_bytes -= sum(saved) - max(saved, default=0)  # one layer at a time is there in full
        return num_bytes


def round_matrices(layer: nn.Module, kind: type[Int8Matrix] | type[Float8Matrix]) -> None:
    """Put 8-bit matrices in the place of a layer's, one after the other, so that few are in memory twice."""
    for name in [name for name, child in layer.named_children() if isinstance(child, Matrix)]:
        setattr(layer, name, kind(getattr(layer, name).weight))


class Rounding:
    """Puts 8-bit matrices into a network, layer by layer as each is filled, and finds what that does to vectors.

    Sample texts run through every layer twice: before it is rounded, and after, behind other rounded layers. So the
    whole network is compared with itself although memory never holds it in full.
    """

    def __init__(self, network: Network, precision: Precision, samples: Sequence[TokenSequence]) -> None:
        """network: its token vectors must be filled before the first layer is rounded."""
        self._network, self._precision, self._samples = network, precision, samples

    @classmethod
    def of_checkpoint(cls, folder: Path, checkpoint: Checkpoint, network: Network, precision: Precision) -> Rounding:
        """With the sample texts, through the checkpoint's own tokenizer; raises CheckpointError."""
        return cls(network, precision, checkpoint.tokenizer(folder, SAMPLE_TOKENS).encode(SAMPLES, ""))

    def begin(self) -> None:
        """Token vectors are filled."""
        self._batch = pack(self._samples, next(self._network.parameters(recurse=False)).device)
        self._before, *self._rest = self._network.begin(self._batch)
        self._after = self._before

    def round(self, layer: nn.Module) -> None:
        """The next layer is filled."""
        assert self._precision.matrix
        self._before = self._after_layer(layer, self._before)
        round_matrices(layer, self._precision.matrix)
        try:
            self._after = self._after_layer(layer, self._after)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (AttributeError, RuntimeError, ValueError) as error:  # what this torch, this device or the sizes lack
            device, name = self._before.device, self._precision.name
            raise DeviceError(
                f"dtype: expected {name} to run on {device}; got: {in_short(error)}; set dtype to 'auto'"
            ) from None

    def _after_layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = layer(x, self._batch, self._network.attend, Whole(), *self._rest)
        return result

    def check(self) -> None:
        """All is filled.

        Raises:
            DeviceError: the vectors are too far from those of the network as it was.
        """
        before, after = (self._network.to_vectors(x, self._batch, Whole()) for x in (self._before, self._after))
        cosine = (before * after).sum(dim=1).min().item()
        name = self._precision.name
        usual = str(self._precision.dtype).removeprefix("torch.")
        assert self._precision.matrix
        least = self._precision.matrix.least_cosine
        if not cosine >= least:  # NaN is not, either
            raise DeviceError(
                f"dtype: expected {name} to keep the vectors of {len(self._samples)} sample texts within a cosine of "
                f"{least} of those in {usual}; got {cosine:.4f}; set dtype to 'auto'"
            )
        logger.info("%s: cosine of sample texts' vectors to those in %s at least %.5f", name, usual, cosine)
