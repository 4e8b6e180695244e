"""What the sync and the async client have in common: everything that is not I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from nv_embed_client.connection import TLS, Connection
from nv_embed_client.errors import ClientClosed, InvalidInput
from nv_embed_client.job import Call, InputType, Job, Limits, Truncate
from nv_embed_client.retry import RetryPolicy
from nv_embed_client.wire import EmbedResult

DEFAULT_URL = "localhost:8001"
DEFAULT_MODEL_NAME = "nv-embed-v2"
_DEFAULT_RETRY = RetryPolicy()


class ClientCore:
    """Settings of a client, and the jobs it makes of calls."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model_name: str = DEFAULT_MODEL_NAME,
        tls: TLS | None = None,
        headers: Mapping[str, str] | None = None,
        request_timeout: float = 120.0,
        max_in_flight: int = 4,
        max_texts_per_request: int = 256,
        max_bytes_per_request: int = 256 * 2**10,
        retry: RetryPolicy = _DEFAULT_RETRY,
    ) -> None:
        """Connects on first use.

        Args:
            url: the server's gRPC address, host:port.
            model_name: as Triton knows it.
            tls: None for a connection in the clear; `TLS()` for one checked against the system's certificates.
            headers: sent with every request, names in lower case: for Triton's restricted protocols, for a proxy.
            request_timeout: seconds for one request, its retries included. A call of many texts is many requests;
                its own `timeout` bounds all of it.
            max_in_flight: requests of one call on their way at the same time.
            max_texts_per_request: no request of a call has more.
            max_bytes_per_request: of UTF-8, the instruction counted once for each text; a longer text goes alone. The
                default is about the largest batch that a server computes at once: it merges requests, so more gains
                nothing, and a slow device may take longer than `request_timeout`.
            retry: when to try again what a busy, stopping or absent server refused.

        Raises:
            InvalidInput: a setting makes no sense.
        """
        for name, value in {
            "request_timeout": request_timeout,
            "max_in_flight": max_in_flight,
            "max_texts_per_request": max_texts_per_request,
            "max_bytes_per_request": max_bytes_per_request,
        }.items():
            if not value > 0:
                raise InvalidInput.of(expected=f"{name} of more than 0", got=str(value), remedy="correct it")
        self._connection = Connection(url, model_name, tls, dict(headers or {}))
        self._limits = Limits(max_texts_per_request, max_bytes_per_request, request_timeout)
        self._max_in_flight = max_in_flight
        self._retry = retry
        self._closed = False
        self._dimension: int | None = None
        self._prepare()

    def _prepare(self) -> None:
        """Make what a subclass needs beside the settings."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        """The server's address."""
        return self._connection.url

    @property
    def model_name(self) -> str:
        """The model's name as Triton knows it."""
        return self._connection.model_name

    def _job(
        self,
        texts: Iterable[str],
        *,
        input_type: InputType,
        instruction: str | None,
        truncate: Truncate,
        token_counts: bool,
        progress: bool,
        timeout: float | None,
        max_texts_per_request: int | None,
    ) -> Job:
        self._check_open()
        call = Call(input_type, instruction, truncate, token_counts, progress, timeout)
        limits = self._limits
        if max_texts_per_request is not None:
            if max_texts_per_request < 1:
                raise InvalidInput.of(
                    expected="max_texts_per_request of at least 1", got=str(max_texts_per_request), remedy="correct it"
                )
            limits = Limits(max_texts_per_request, limits.max_bytes_per_request, limits.request_timeout_seconds)
        return Job(texts, call, limits, self._retry)

    def _check_open(self) -> None:
        if self._closed:
            raise ClientClosed("expected an open client; got one that was closed; make a new one")

    def _remember(self, result: EmbedResult) -> EmbedResult:
        self._dimension = result.embeddings.shape[1]
        return result


def empty_result(dimension: int, *, token_counts: bool) -> EmbedResult:
    """What no texts give: [0, dim]."""
    return EmbedResult(np.empty((0, dimension), np.float32), np.empty(0, np.int32) if token_counts else None)
