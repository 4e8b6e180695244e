"""Finds at the start whether a CPU should compute in bfloat16 instead of float32.

The processor's flags do not say it: some with instructions for bfloat16 gain nothing by them, and what a model loses by
rounding is its own affair. So both are measured, with the model that is served.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

from nv_embed.compute.engine import Engine
from nv_embed.sequence import TokenSequence

logger = logging.getLogger(__name__)

_LEAST_GAIN = 1.2  # of speed; a smaller one may be chance, and not worth the rounding
_LEAST_COSINE = 0.999  # of each sample text's two vectors
_COPIES = 4  # of the sample texts in a batch, so that it is as large as those of a server with work
_MOST_ROUNDS, _MOST_SECONDS = 5, 2.0


def faster(
    exact: Engine, rounded: Engine, sequences: Sequence[TokenSequence], clock: Callable[[], float] = time.monotonic
) -> Engine:
    """The one of two engines that should serve: the second if it is clearly faster and gives the same vectors.

    Args:
        exact: in float32.
        rounded: the same model in bfloat16.
        sequences: sample texts, not empty.
        clock: seconds.
    """
    vectors, others = exact.embed(sequences), rounded.embed(sequences)
    cosine = float((vectors * others).sum(axis=1).min())
    gain = _gain(exact, rounded, [*sequences] * _COPIES, clock)
    is_better = cosine >= _LEAST_COSINE and gain >= _LEAST_GAIN  # NaN is not
    chosen = rounded if is_better else exact
    logger.info(
        "%s: dtype %s, because bfloat16 is %.2f times as fast as float32 (%.1f needed), and the vectors of sample "
        "texts have a cosine of at least %.5f (%.3f needed)",
        chosen.device, chosen.dtype, gain, _LEAST_GAIN, cosine, _LEAST_COSINE,
    )  # fmt: skip
    return chosen


def _gain(exact: Engine, rounded: Engine, batch: Sequence[TokenSequence], clock: Callable[[], float]) -> float:
    """How many times as fast the second is, each at its best: what else the machine does may hit either."""
    best = dict.fromkeys((exact, rounded), math.inf)
    begun = clock()
    for _ in range(_MOST_ROUNDS):
        for engine in best:
            started = clock()
            engine.embed(batch)
            best[engine] = min(best[engine], clock() - started)
        if clock() - begun > _MOST_SECONDS:
            break
    return best[exact] / best[rounded]
