"""The gateway's paths: which of them need no key, which answer in TEI's shapes, and their labels in the metrics."""

from __future__ import annotations

LIVE = ("/health/live", "/v1/health/live")
READY = ("/health", "/health/ready", "/v1/health/ready")
TEI = frozenset({"/", "/embed", "/info"})

_LOOKUP = "/v1/models/{model}"
_OPEN = frozenset({*LIVE, *READY, "/", "/metrics", "/docs", "/openapi.json"})
_LABELS = _OPEN | TEI | {"/v1/embeddings", "/v1/metadata", "/v1/models"}


def normal(path: str) -> str:
    """The path without doubled slashes and without one at its end, as base URLs and clients often add them."""
    return "/" + "/".join(part for part in path.split("/") if part)


def is_open(method: str, path: str) -> bool:
    """Whether it needs no key: POST to / is TEI's way to embed, GET is the page."""
    return method == "GET" and path in _OPEN


def label(path: str) -> str:
    """For the metrics: others than ours share one label, because clients make them up, and so do names of models."""
    return path if path in _LABELS else _LOOKUP if path.startswith("/v1/models/") else "other"
