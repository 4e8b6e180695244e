"""What the rest of the server sees of a checkpoint. Each kind of checkpoint is one file beside this one.

Most kinds are a `Checkpoint`: it builds a `Network` of this project, which `compute/` fills, rounds, compiles and runs
on packed tokens. A `LibraryCheckpoint` loads a `Model` that another library computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nv_embed.sequence import TokenSequence


@dataclass(frozen=True, slots=True, eq=False)
class Padding:
    """S sequences of a packed row as rows of L tokens each, the length of the longest."""

    sources: Tensor  # [S * L] int32: the packed token at each place; behind its end, a sequence's own last one
    places: Tensor  # [T] int32: where each packed token is in them
    bias: Tensor  # [S, 1, L] float32 for scores: 0, and minus infinity behind a sequence's end


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """S sequences of T tokens in all, one after the other and without padding; P of the tokens are pooled."""

    input_ids: Tensor  # [T] int32
    position_ids: Tensor  # [T] int32, from 0 in every sequence
    cu_seqlens: Tensor  # [S + 1] int32: sequence s is tokens cu_seqlens[s] to cu_seqlens[s + 1]
    max_seqlen: int
    seqlens: tuple[int, ...]  # the lengths again, on the host, where loops and kernel choice need them
    pooled_indices: Tensor  # [P] int32: tokens that are pooled, in order
    pooled_seqlens: tuple[int, ...]  # pooled tokens of each sequence, at least 1

    @cached_property
    def padding(self) -> Padding:
        """On the CPU; the same for every layer."""
        seqlens, within = np.array(self.seqlens, dtype=np.int32)[:, None], np.arange(self.max_seqlen, dtype=np.int32)
        starts = np.cumsum(seqlens, axis=0, dtype=np.int32) - seqlens
        exists = within < seqlens
        return Padding(
            sources=torch.from_numpy((starts + np.minimum(within, seqlens - 1)).ravel()),
            places=torch.from_numpy(np.flatnonzero(exists).astype(np.int32)),
            bias=torch.from_numpy(np.where(exists, np.float32(0), np.float32(-np.inf))[:, None]),
        )


FEWEST_ROWS = 192  # of a matrix product: with fewer, it is slower


class Work(Protocol):
    """How a device wants a pass to be computed."""

    def pieces(self, num_rows: int, multiply_adds: int, fewest_rows: int = FEWEST_ROWS) -> Iterable[slice]:
        """The rows to compute at a time, in order, when each costs `multiply_adds`; may raise between them.

        A piece has `fewest_rows` or more, unless the end comes first.
        """

    def little_left(self) -> None:
        """Take note that little of the pass is left to compute."""


def over_rows(work: Work, multiply_adds: int, function: Callable[..., Any], *inputs: Tensor) -> Any:
    """`function(*inputs)`, in pieces if `work` wants them.

    Args:
        work: how to compute.
        multiply_adds: of one row.
        function: computes each row by itself: [T, ...] inputs to one or several [T, ...] outputs.
        inputs: with the same number of rows.
    """
    num_rows = len(inputs[0])
    outputs: tuple[Tensor, ...] = ()
    part: Any = None
    for rows in work.pieces(num_rows, multiply_adds):
        if rows.stop - rows.start == num_rows:
            return function(*inputs)
        part = function(*(tensor[rows] for tensor in inputs))
        parts = part if isinstance(part, tuple) else (part,)
        outputs = outputs or tuple(tensor.new_empty(num_rows, *tensor.shape[1:]) for tensor in parts)
        for output, tensor in zip(outputs, parts, strict=True):
            output[rows] = tensor
    return outputs if isinstance(part, tuple) else outputs[0]


def mean_shares(x: Tensor, seqlens: Sequence[int], rows: slice) -> Tensor:
    """What some rows add to the mean of each sequence.

    Args:
        x: [R, N], `rows` of all pooled rows.
        seqlens: pooled rows of each of the S sequences.
        rows: which ones `x` holds.

    Returns:
        [S, N] float32. Over all pieces they add up to the means.
    """
    own = [
        max(min(stop, rows.stop) - max(stop - n, rows.start), 0)
        for n, stop in zip(seqlens, accumulate(seqlens), strict=True)
    ]
    return torch.stack([
        part.mean(dim=0, dtype=torch.float32) if len(part) == n else part.sum(dim=0, dtype=torch.float32) / n
        for part, n in zip(x.split_with_sizes(own), seqlens, strict=True)
    ])  # fmt: skip


@dataclass(frozen=True, slots=True)
class Heads:
    """Of a network's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


# Full, bidirectional, grouped-query attention within each sequence; softmax scale head_dim ** -0.5.
# q [T, num_heads, head_dim], k and v [T, num_kv_heads, head_dim], the batch, how to compute -> [T, num_heads, head_dim]
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, PackedBatch, Work], Tensor]
# A tensor of the checkpoint by its name, or a part of it: float32, on the network's device.
Read: TypeAlias = Callable[..., Tensor]


def parameter(*shape: int) -> nn.Parameter:
    """One without values, on whatever device is current."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class Matrix(nn.Module):
    """What tokens are multiplied by. `compute/precision.py` has others to put in the place of a layer's."""

    def __init__(self, num_outputs: int, num_inputs: int, *, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = parameter(num_outputs, num_inputs)
        self.bias = parameter(num_outputs) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, inputs] to [T, outputs]."""
        return functional.linear(x, self.weight, self.bias)


class Network(nn.Module):
    """Packed tokens to one unit vector for each sequence. Built without values; `compute/weights.py` fills it."""

    attend: Attend  # set before the first pass, where there are heads
    optional_prefix = ""  # which may stand before the names of all the checkpoint's tensors

    def __init__(self, vocab_size: int, layers: Iterable[nn.Module] = (), heads: Heads | None = None) -> None:
        """
        Args:
            vocab_size: no token id reaches it.
            layers: one after the other, each called with its input, the batch, `attend`, the work, and what else
                `begin` returns; returns what the next one reads first.
            heads: of the layers' attention.
        """
        super().__init__()
        self.vocab_size, self.heads = vocab_size, heads
        self.layers = nn.ModuleList(layers)

    def forward(self, batch: PackedBatch, work: Work) -> Tensor:
        """Returns [S, dimension] float32 rows of length 1."""
        x, *rest = self.begin(batch)
        for number, layer in enumerate(self.layers):
            if number == len(self.layers) * 7 // 8:
                work.little_left()
            x = layer(x, batch, self.attend, work, *rest)
        return self.to_vectors(x, batch, work)

    def begin(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """What the first layer reads: token vectors [T, C], and what every layer reads beside its own input."""
        raise NotImplementedError

    def to_vectors(self, x: Tensor, batch: PackedBatch, work: Work) -> Tensor:
        """What the last layer returns, [T, C], to [S, dimension] float32 rows of length 1."""
        raise NotImplementedError

    def places(self) -> Iterator[tuple[str, Tensor]]:
        """Where each of the checkpoint's tensors goes that is copied as it is and is no layer's, by name."""
        raise NotImplementedError

    def layer_places(self, number: int) -> Iterator[tuple[str, Tensor]]:
        """The same of one layer: a parameter, or its part of one."""
        raise NotImplementedError

    def folded_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensors of the checkpoint that are not copied but folded into others."""
        return {}

    def fold(self, read: Read) -> None:
        """Fold them, and make what else is constant; what `places` names is filled."""

    def parts_on_tokens(self) -> list[tuple[nn.Module, str]]:
        """Methods that act on each token alone, and so may be compiled once for any number of tokens."""
        return []

    @property
    def numbers_per_token(self) -> int:
        """How many numbers a pass keeps for each token at most, the values within a piece aside."""
        raise NotImplementedError


class TextEncoder(Protocol):
    """Texts to sequences."""

    def encode(
        self, texts: Sequence[str], instruction: str, *, truncate: bool = True, first_index: int = 0
    ) -> list[TokenSequence]:
        """Tokenize texts, each behind the instruction; see `nv_embed.tokenizer.Tokenizer.encode`."""


class Described(Protocol):
    """What requests and answers need to know of a model."""

    @property
    def dimension(self) -> int:
        """Numbers of a vector."""

    @property
    def query_instruction(self) -> str:
        """Stands before a query when the request names none."""

    @property
    def document_instruction(self) -> str:
        """The same of documents."""

    @property
    def pooling(self) -> str:
        """How the vectors of tokens become one: 'mean', 'cls', 'lasttoken' and so on."""

    @property
    def longest_text(self) -> int | None:
        """Tokens of the longest text for which it was made; None if any length will do."""

    @property
    def hidden_size(self) -> int:
        """Width of the network."""

    @property
    def dtype(self) -> str:
        """Of the weights on disk: a torch dtype's name."""


class Checkpoint(Described, Protocol):
    """What `config.json` says, and what kind of checkpoint it is."""

    def tokenizer(self, folder: Path, max_sequence_tokens: int) -> TextEncoder:
        """Read the folder's tokenizer; raises CheckpointError."""

    def network(self) -> Network:
        """Without values, on whatever device is current."""


class Model(Protocol):
    """What an engine runs on a device."""

    @property
    def network(self) -> nn.Module:
        """What holds its weights."""

    @property
    def samples(self) -> Sequence[TokenSequence]:
        """Texts to try it with."""

    def embed(self, sequences: Sequence[TokenSequence], work: Work) -> Tensor:
        """[S, dimension] float32 rows of length 1, in the order of the sequences. A row does not depend on others."""


@runtime_checkable
class LibraryCheckpoint(Described, Protocol):
    """A folder that another library loads."""

    def tokenizer(self, folder: Path, max_sequence_tokens: int) -> TextEncoder:
        """Read the folder's tokenizer; raises CheckpointError."""

    @property
    def numbers_per_token(self) -> int:
        """How many numbers a pass keeps for each token at most: an estimate."""

    def num_parameters(self) -> int:
        """Numbers in the files of weights; raises CheckpointError if one is missing or damaged."""

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> Model:
        """Read its weights; raises CheckpointError. `load` may be called once for each device."""


AnyCheckpoint: TypeAlias = Checkpoint | LibraryCheckpoint
