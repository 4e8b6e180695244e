"""How much may wait and how much is computed at once, queries before documents; knows no state and no threads.

Which text comes next is in `fair_queue.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nv_embed.scheduling.pace import MIN_BATCH_TOKENS

_QUERY_RESERVE = 8  # an eighth more may wait for queries, so that bulk which fills the queue does not shut them out
_USUAL_PASS_SECONDS = 0.5
_SMALL_TOKENS = 256  # below it a text costs more than in a larger batch, which reads the weights once for all
_MOST_SPARED = 2  # engines: however many cores there are, one process of Python receives and answers, beside Triton


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How much is computed at once, and how much may wait and for how long."""

    max_batch_tokens: int
    most_small_batches: int  # at once, see `most_small_batches`
    target_batch_seconds: float | None  # fewer tokens when a batch takes longer than this; None: never
    max_queue_tokens: int
    max_queue_bytes: int
    max_queue_texts: int
    max_queue_seconds: float
    query_weight: int
    cache_bytes: int


def room(limit: int, *, is_query: bool) -> int:
    """How much may wait when a request of this kind comes."""
    return limit + limit // _QUERY_RESERVE if is_query else limit


def share(num_waiting_tokens: int, num_idle_engines: int) -> int:
    """Tokens for one engine while others have nothing to do, so that together they finish sooner."""
    return max(math.ceil(num_waiting_tokens / (num_idle_engines + 1)), MIN_BATCH_TOKENS)


def is_small(num_tokens: int) -> bool:
    """Whether a text costs more in a batch of these than in a larger one."""
    return num_tokens < _SMALL_TOKENS


def most_small_batches(device_kinds: Sequence[str]) -> int:
    """How many small batches are computed at once, by the kind of each engine's device: 'cpu' or 'cuda'.

    What waits meanwhile makes the next batch larger. On a CPU, receiving and answering need cores, too. So small
    batches leave them one or two, but never more than half.
    """
    num_engines = len(device_kinds)
    return max(num_engines // 2, num_engines - _MOST_SPARED, 1) if set(device_kinds) == {"cpu"} else num_engines


def may_interrupt(own_seconds: float, others_seconds: float) -> bool:
    """Whether a pass of this many seconds so far lets short batches go first.

    A pass keeps at least half of the time of its thread. So a long text delays nobody by minutes, and short ones at
    most double its time. A pass of usual length is not interrupted.
    """
    return own_seconds >= _USUAL_PASS_SECONDS and others_seconds < own_seconds
