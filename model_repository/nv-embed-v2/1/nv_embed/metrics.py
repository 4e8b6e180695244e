"""What the server counts: a table of metrics, and their values until they are published; knows no Triton.

Publishing one value can cost as much as a short forward pass on a GPU. So values are added up here, in plain Python,
and taken, a few times a second, by whoever owns the way out.
"""

from __future__ import annotations

from collections import defaultdict
from enum import Enum
from itertools import product
from threading import Lock
from typing import NamedTuple, TypeAlias

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TOKENS = tuple(float(2**n) for n in range(4, 18))
_TEXTS = tuple(float(2**n) for n in range(13))


class Metric(Enum):
    """Name without the prefix `nv_embed_`, kind, description, buckets of a histogram."""

    REQUESTS = "requests_total", "counter", "Requests answered, by kind and outcome", ()
    REQUEST_SECONDS = "request_seconds_total", "counter", "Time from arrival to outcome, summed over requests", ()
    TEXTS = "texts_total", "counter", "Texts by source of their vectors: computed or cached", ()
    TOKENS = "tokens_total", "counter", "Tokens computed", ()
    BATCH_TOKENS = "batch_tokens", "histogram", "Tokens in a batch", _TOKENS
    BATCH_TEXTS = "batch_texts", "histogram", "Texts in a batch", _TEXTS
    QUEUE_SECONDS = "batch_queue_seconds", "histogram", "Longest time that a text of a batch had waited", _SECONDS
    COMPUTE_SECONDS = "batch_compute_seconds", "histogram", "Time of a batch on the device", _SECONDS
    TOKENIZE_SECONDS = "tokenize_seconds_total", "counter", "Time spent tokenizing", ()
    ANSWER_SECONDS = "answer_seconds_total", "counter", "Time spent sending answers", ()
    QUEUE_TOKENS = "queue_tokens", "gauge", "Tokens that wait to be computed", ()
    QUEUE_BYTES = "queue_bytes", "gauge", "Bytes of text that wait to be tokenized", ()
    OUT_OF_MEMORY = "out_of_memory_total", "counter", "Batches halved because they did not fit on the device", ()
    DROPPED_TEXTS = "dropped_texts_total", "counter", "Texts not computed because their requests had ended", ()
    CACHE_BYTES = "cache_bytes", "gauge", "Memory that cached vectors take", ()

    def __init__(self, suffix: str, kind: str, description: str, buckets: tuple[float, ...]) -> None:
        self.metric_name = f"nv_embed_{suffix}"
        self.kind = kind
        self.description = description
        self.buckets = buckets


Labels: TypeAlias = tuple[tuple[str, str], ...]  # name and value, sorted by name

_INPUTS = ("query", "documents")
_LABELS: dict[Metric, dict[str, tuple[str, ...]]] = {
    Metric.REQUESTS: {
        "kind": (*_INPUTS, "model_info", "unknown"),  # unknown: refused before it was understood
        "outcome": ("ok", "InvalidRequest", "Unavailable", "Cancelled", "OutOfDeviceMemory", "ComputeFailed"),
    },
    Metric.REQUEST_SECONDS: {"kind": _INPUTS},
    Metric.TEXTS: {"source": ("computed", "cached")},
}
# Every series that there can be. Dashboards and alerts cannot see one that is absent until it first counts.
SERIES: tuple[tuple[Metric, Labels], ...] = tuple(
    (metric, tuple(zip(_LABELS.get(metric, {}), values, strict=True)))
    for metric in Metric
    for values in product(*_LABELS.get(metric, {}).values())
)


class Update(NamedTuple):
    """What a counter is raised by, a gauge set to, or a histogram has observed."""

    metric: Metric
    labels: Labels
    value: float


class Recorder:
    """Collects values from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counters: defaultdict[tuple[Metric, Labels], float] = defaultdict(float)
        self._gauges: dict[Metric, float] = {}
        self._observations: list[Update] = []

    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        """Raise a counter."""
        with self._lock:
            self._counters[metric, tuple(sorted(labels.items()))] += amount

    def set(self, metric: Metric, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._gauges[metric] = value

    def observe(self, metric: Metric, value: float) -> None:
        """Add one observation to a histogram."""
        with self._lock:
            self._observations.append(Update(metric, (), value))

    def take(self) -> list[Update]:
        """What has come together since the last time: sums of counters, latest gauges, each observation."""
        with self._lock:
            updates = [Update(metric, labels, amount) for (metric, labels), amount in self._counters.items()]
            updates += [Update(metric, (), value) for metric, value in self._gauges.items()]
            updates += self._observations
            self._counters.clear()
            self._gauges.clear()
            self._observations = []
            return updates
