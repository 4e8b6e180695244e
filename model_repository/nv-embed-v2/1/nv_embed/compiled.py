"""The network's layers and pooling head compiled: what lies between matrix products read and written once.

Compiled is what acts on each token alone, for any number of tokens; attention stays what `attention.py` chose.
"""

from __future__ import annotations

import logging
import os
import time

import numpy as np
import torch
from torch import Tensor

from nv_embed.errors import DeviceError
from nv_embed.network import Network
from nv_embed.packing import pack
from nv_embed.tokenizer import TokenSequence

logger = logging.getLogger(__name__)

_LEAST_COSINE = 0.999  # of a vector to the one before; half precision rounds elsewhere than before, no more
_SAMPLE_LENGTHS = (5, 40, 300)


def compile_network(network: Network, choice: str, device: torch.device) -> None:
    """Compile a filled network in place, and prove it against itself as it was.

    Args:
        choice: 'on', 'off', or 'auto': on a GPU, as far as it works there, and not on a CPU, where a small network
            would take longer to compile than most have to wait. The log says what came of it.

    Raises:
        DeviceError: it was asked for by name and does not work here, or the device broke.
    """
    if choice == "off" or (choice == "auto" and device.type == "cpu"):
        return
    # In this process: torch would start others with whatever Python is called sys.executable, and inside Triton none is.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.compiler.set_stance("default")
    started = time.monotonic()
    parts = [(layer, name) for layer in network.layers for name in ("before_attention", "after_attention")]
    parts.append((network.pooling, "forward"))
    try:
        before = _sample_vectors(network, device)
        for module, name in parts:
            # Layers differ in their weights alone, which are inputs to what is compiled: it is compiled once.
            setattr(module, name, torch.compile(getattr(module, name), dynamic=True))
        cosine = (before * _sample_vectors(network, device)).sum(dim=1).min().item()
        if not cosine >= _LEAST_COSINE:  # NaN is not, either
            raise ValueError(f"its vectors have a cosine of {cosine:.5f} to those of the network as it was")
    except torch.AcceleratorError as error:  # nothing can be computed on this device any more
        raise DeviceError(f"compile: compiled layers broke {device}: {error}; set compile to 'off'") from None
    except Exception as error:  # a compiler that is missing or fails has no error of its own
        for module, name in parts:
            module.__dict__.pop(name, None)
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if choice == "auto":
            logger.warning("%s: layers not compiled, which is slower, for: %s", device, reason)
            return
        raise DeviceError(
            f"compile: expected the layers to compile for {device}; got: {reason}; install what is missing (a C "
            "compiler and Python's headers), or set compile to 'auto' or 'off'"
        ) from None
    else:
        logger.info("%s: layers compiled in %.0f s", device, time.monotonic() - started)
    finally:
        # Whatever a batch might make torch compile once more, one token alone, say, is computed as it stands instead.
        torch.compiler.set_stance("eager_on_recompile")


def _sample_vectors(network: Network, device: torch.device) -> Tensor:
    ids = np.arange(sum(_SAMPLE_LENGTHS), dtype=np.int32) * 7919 % network.config.vocab_size
    sequences = [TokenSequence(part, 0) for part in np.split(ids, np.cumsum(_SAMPLE_LENGTHS)[:-1])]
    vectors: Tensor = network(pack(sequences, device))
    return vectors
