"""How matrices lie in a CPU's memory: row by row, or as oneDNN reads them fastest.

Torch keeps a matrix row by row. oneDNN multiplies bfloat16, and has to rearrange the matrix for every product. Float32
goes to MKL, which is tuned for Intel's processors. Torch's own compiler arranges constant matrices with the same calls.
Knows no files and no kind of checkpoint.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nv_embed.compute.engine import Engine, PackedModel
from nv_embed.errors import in_short
from nv_embed.models.protocol import Matrix

logger = logging.getLogger(__name__)

_ROWS = 64  # of the products for which it is arranged; others are right, too
_LEAST_COSINE = {torch.float32: 0.99999, torch.bfloat16: 0.999}  # of each sample text's vectors before and after
_MOST_SHARE = 1.05  # of the time before; a smaller loss may be chance, and every start should come to the same
_MOST_ROUNDS, _MOST_SECONDS = 5, 1.0


def arrange(engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
    """Arrange the matrices of an engine on a CPU, unless that makes it slower or changes the vectors of its samples.

    The log says which. Compiled layers are left as they are, because what is compiled is compiled for their matrices.
    Other dtypes than float32 and bfloat16 are left, too.
    """
    if isinstance(engine.model, PackedModel) and engine.model.is_compiled:
        return
    matrices = _matrices(engine.model.network)
    dtype = next((matrix.weight.dtype for matrix in matrices), None)
    if dtype not in _LEAST_COSINE:
        return
    try:
        before, seconds = _measured(engine, clock)
        for matrix in matrices:
            _arrange(matrix)
        after, arranged_seconds = _measured(engine, clock)
    except Exception as error:  # what torch, the processor, the memory or a library lacks has no error of its own
        why = in_short(error)
    else:
        share, cosine = arranged_seconds / seconds, float((before * after).sum(axis=1).min())
        why = f"sample texts take {share:.2f} of the time, and their vectors have a cosine of at least {cosine:.6f}"
        if cosine >= _LEAST_COSINE[dtype] and share <= _MOST_SHARE:  # NaN is not
            logger.info("%s: %s matrices arranged for oneDNN: %s", engine.device, engine.dtype, why)
            return
    for matrix in matrices:
        _restore(matrix)
    logger.info("%s: %s matrices left row by row; arranged for oneDNN: %s", engine.device, engine.dtype, why)


def _matrices(network: nn.Module) -> list[Matrix | nn.Linear]:
    """Those whose weight nothing else has."""
    uses = Counter(id(parameter) for module in network.modules() for parameter in module.parameters(recurse=False))
    found = (module for module in network.modules() if type(module) in (Matrix, nn.Linear))
    return [matrix for matrix in found if uses[id(matrix.weight)] == 1]  # type: ignore[misc]


@torch.inference_mode()
def _arrange(matrix: Matrix | nn.Linear) -> None:
    arranged = torch.ops.mkldnn._reorder_linear_weight(matrix.weight, _ROWS)
    matrix.weight = nn.Parameter(arranged, requires_grad=False)
    matrix.forward = partial(_product, matrix.weight, matrix.bias)  # type: ignore[method-assign]


@torch.inference_mode()
def _restore(matrix: Matrix | nn.Linear) -> None:
    if matrix.weight.is_mkldnn:
        matrix.weight = nn.Parameter(matrix.weight.to_dense(), requires_grad=False)
    matrix.__dict__.pop("forward", None)


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x: [..., inputs] to [..., outputs]."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _measured(engine: Engine, clock: Callable[[], float]) -> tuple[npt.NDArray[np.float32], float]:
    """The samples' vectors, and the seconds of the fastest pass: what else the machine does makes others longer."""
    best, begun = math.inf, clock()
    for _ in range(_MOST_ROUNDS):
        started = clock()
        vectors = engine.embed(engine.model.samples)
        best = min(best, clock() - started)
        if clock() - begun > _MOST_SECONDS:
            break
    return vectors, best
