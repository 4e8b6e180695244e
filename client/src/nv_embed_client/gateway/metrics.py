"""What a gateway counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nv_embed_client.gateway import paths


class GatewayMetrics:
    """The metrics of one gateway; two in one process do not meet."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "nv_embed_gateway_requests", "Requests answered", ["path", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "nv_embed_gateway_request_seconds",
            "From the first byte of a request to the last of its answer",
            ["path"],
            registry=self._registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        )
        self.in_flight = Gauge(
            "nv_embed_gateway_requests_in_flight", "Requests not yet answered", registry=self._registry
        )
        self.texts = Counter("nv_embed_gateway_texts", "Texts embedded", registry=self._registry)
        self.tokens = Counter("nv_embed_gateway_tokens", "Tokens of texts embedded", registry=self._registry)
        self.truncated_texts = Counter(
            "nv_embed_gateway_truncated_texts", "Texts that were too long and were cut", registry=self._registry
        )
        self.hung_up = Counter(
            "nv_embed_gateway_hung_up", "Requests cancelled because their client hung up", registry=self._registry
        )

    def observe(self, path: str, status: int, seconds: float) -> None:
        """One request is over."""
        label = paths.label(path)
        self._requests.labels(label, str(status)).inc()
        self._seconds.labels(label).observe(seconds)

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
