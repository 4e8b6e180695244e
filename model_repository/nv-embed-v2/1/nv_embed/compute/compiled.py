"""Compiles what acts on each token alone, so that what lies between matrix products is read and written once.

It serves any number of tokens. Attention stays what `attention.py` chose.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nv_embed.compute.packing import pack
from nv_embed.compute.pieces import Whole
from nv_embed.compute.precision import least_cosine_of_repeats
from nv_embed.errors import DeviceError, in_short
from nv_embed.models.protocol import Network
from nv_embed.sequence import TokenSequence

logger = logging.getLogger(__name__)

_SAMPLE_LENGTHS = (5, 40, 300)
_OTHER_LENGTHS = (2, 70)
_MOST_VERSIONS = 64  # of what is compiled: one for each device


def compile_network(network: Network, choice: str, device: torch.device) -> bool:
    """Compile a filled network in place, and prove it against itself as it was.

    The result is valid for the number of threads that torch has now.

    Args:
        choice: 'on', 'off', or 'auto': on a GPU if it works there, and never on a CPU, where compiling takes longer
            than a small network is worth. The log says which.

    Returns:
        whether it is compiled.

    Raises:
        DeviceError: it was asked for by name and does not work here, or the device broke.
    """
    parts = network.parts_on_tokens()
    if not parts or choice == "off" or (choice == "auto" and device.type == "cpu"):
        return False
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor  # neither is imported where nothing is compiled: it takes seconds

    dynamo.recompile_limit = _MOST_VERSIONS
    inductor.compile_threads = 1  # more would be processes of sys.executable, which inside Triton is no Python
    started = time.monotonic()
    try:
        before = _sample_vectors(network, device, _SAMPLE_LENGTHS)
        torch.compiler.set_stance("default")
        # Layers differ in their weights alone, which are inputs to what is compiled: it is compiled once.
        compiled = [torch.compile(getattr(module, name)) for module, name in parts]
        for (module, name), function in zip(parts, compiled, strict=True):
            setattr(module, name, partial(_with_dynamic_rows, function))
        cosine = (before * _sample_vectors(network, device, _SAMPLE_LENGTHS)).sum(dim=1).min().item()
        if not cosine >= least_cosine_of_repeats(network):  # NaN is not, either
            raise ValueError(f"its vectors have a cosine of {cosine:.5f} to those of the network as it was")
        for (module, name), function in zip(parts, compiled, strict=True):
            setattr(module, name, function)
        torch.compiler.set_stance("fail_on_recompile")
        _sample_vectors(network, device, _OTHER_LENGTHS)
    except torch.AcceleratorError as error:  # nothing can be computed on this device any more
        raise DeviceError(f"compile: compiled layers broke {device}: {in_short(error)}; set compile to 'off'") from None
    except Exception as error:  # a compiler that is missing or fails has no error of its own
        for module, name in parts:
            module.__dict__.pop(name, None)
        reason = f"{type(error).__name__}: {in_short(error)}"
        if choice == "auto":
            logger.warning("%s: layers not compiled, which is slower, because: %s", device, reason)
            return False
        raise DeviceError(
            f"compile: expected the layers to compile for {device}; got: {reason}; install what is missing (a C++ "
            "compiler and Python's headers), or set compile to 'auto' or 'off'"
        ) from None
    else:
        logger.info("%s: layers compiled in %.0f s", device, time.monotonic() - started)
        return True
    finally:
        # What torch would have to compile again for, such as a batch of a single token, runs uncompiled.
        torch.compiler.set_stance("eager_on_recompile")


def _with_dynamic_rows(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """Call what is to be compiled for any number of rows of its inputs, and for no other sizes than these."""
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 0)
    return function(*inputs)


def sample_sequences(vocab_size: int, lengths: Sequence[int] = _SAMPLE_LENGTHS) -> list[TokenSequence]:
    """Of these lengths, to try a network with. Their tokens mean nothing."""
    ids = np.arange(sum(lengths), dtype=np.int32) * 7919 % vocab_size
    return [TokenSequence(part, 0) for part in np.split(ids, np.cumsum(lengths)[:-1])]


def _sample_vectors(network: Network, device: torch.device, lengths: Sequence[int]) -> Tensor:
    vectors: Tensor = network(pack(sample_sequences(network.vocab_size, lengths), device), Whole())
    return vectors
