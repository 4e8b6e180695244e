"""How matrices lie in a CPU's memory. Those that are multiplied again and again can lie as oneDNN reads them fastest.

Torch keeps a matrix row by row. So oneDNN, which multiplies bfloat16, rearranges it in every product, and what
multiplies float32 in its place is made for processors of one maker. Torch's own compiler arranges matrices in this way.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from nv_embed.compute.engine import Engine, PackedModel
from nv_embed.errors import in_short
from nv_embed.models.protocol import Matrix
from nv_embed.sequence import TokenSequence

logger = logging.getLogger(__name__)

_ROWS = 64  # of the products for which it is arranged; others are right, too
_LEAST_COSINE = {torch.float32: 0.99999, torch.bfloat16: 0.999}  # of each sample text's vectors before and after
_LEAST_GAIN = 0.95  # of speed; a smaller loss may be chance, and every start should come to the same
_MOST_ROUNDS, _MOST_SECONDS = 5, 1.0


def arrange(engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
    """Arrange the matrices of an engine on a CPU, unless that makes it slower or changes the vectors of its samples.

    The log says which. Compiled layers are left as they are, because what is compiled is compiled for their matrices.
    So are other dtypes than float32 and bfloat16.
    """
    if isinstance(engine.model, PackedModel) and engine.model.is_compiled:
        return
    matrices = _matrices(engine.model.network)
    dtype = next((matrix.weight.dtype for matrix in matrices), None)
    if dtype not in _LEAST_COSINE:
        return
    samples = engine.model.samples
    vectors, seconds = engine.embed(samples), _best_seconds(engine, samples, clock)
    try:
        for matrix in matrices:
            _arrange(matrix)
        cosine = float((vectors * engine.embed(samples)).sum(axis=1).min())
        gain = seconds / _best_seconds(engine, samples, clock)
    except (
        AttributeError,
        NotImplementedError,
        RuntimeError,
        TypeError,
    ) as error:  # what this torch or processor lacks
        why = in_short(error)
    else:
        why = f"sample texts take {1 / gain:.2f} of the time, and their vectors have a cosine of at least {cosine:.6f}"
        if cosine >= _LEAST_COSINE[dtype] and gain >= _LEAST_GAIN:  # NaN is not
            logger.info("%s: %s matrices arranged for oneDNN, because %s", engine.device, engine.dtype, why)
            return
    for matrix in matrices:
        _restore(matrix)
    logger.info("%s: %s matrices left row by row, because arranged for oneDNN: %s", engine.device, engine.dtype, why)


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


def _best_seconds(engine: Engine, samples: Sequence[TokenSequence], clock: Callable[[], float]) -> float:
    """Of a pass over the samples: what else the machine does makes others longer."""
    best, begun = math.inf, clock()
    for _ in range(_MOST_ROUNDS):
        started = clock()
        engine.embed(samples)
        best = min(best, clock() - started)
        if clock() - begun > _MOST_SECONDS:
            break
    return best
