"""What carries requests to a server: the interface, and a mock for tests without a server."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from nv_embed_client.embedding_type import NUMBERS, Embeddings, packed
from nv_embed_client.errors import NVEmbedError
from nv_embed_client.instructions import QUERY_INSTRUCTION
from nv_embed_client.model_info import ModelInfo
from nv_embed_client.wire import EmbedRequest, EmbedResult

T = TypeVar("T")


class Transport(ABC):
    """Carries the requests of both clients, the sync and the async one; any number of threads may use it at once.

    No method waits: what takes time is a future. Its exception is an `NVEmbedError`; cancelling it cancels the request.
    """

    @abstractmethod
    def embed(self, request: EmbedRequest, timeout_seconds: float) -> Future[EmbedResult]:
        """Send a request; the future ends within `timeout_seconds`."""

    @abstractmethod
    def is_ready(self, timeout_seconds: float) -> Future[bool]:
        """Ask whether the model is ready; the future ends within `timeout_seconds`."""

    def model_info(self, timeout_seconds: float) -> Future[ModelInfo | None]:
        """Ask what the model is; None: the server does not say. The future ends within `timeout_seconds`."""
        return _done(None)

    def check(self) -> float | None:
        """Look after the connections; called while calls wait. Seconds until it is due again, None for never."""
        return None

    def close(self) -> None:  # noqa: B027 - most have nothing to give up
        """Give up the connections; the client ends its calls itself."""


Answer: TypeAlias = EmbedResult | npt.ArrayLike | Future[EmbedResult]


class MockTransport(Transport):
    """A server that is not there, to test code that uses a client.

    client = NVEmbedClient(transport=MockTransport())
    client = NVEmbedClient(transport=MockTransport(lambda request: [[1.0, 0.0]] * len(request.texts)))

    Attributes:
        requests: all that were sent, in order.
        ready: what `is_ready` answers.
        info: what `model_info` answers; with a handler None, because only the handler knows its vectors.
    """

    def __init__(self, handler: Callable[[EmbedRequest], Answer] | None = None, *, dimension: int = 4096) -> None:
        """
        Args:
            handler: answers a request with vectors [n, dim], with an `EmbedResult`, with a future of one, or raises an
                `NVEmbedError`. None: unit vectors of random numbers, always the same for the same text and instruction.
            dimension: of the vectors without a handler.
        """
        self._handler = handler
        self._dimension = dimension
        self.requests: list[EmbedRequest] = []
        self.ready = True
        self.info = None if handler else _mock_info(dimension)

    def embed(self, request: EmbedRequest, timeout_seconds: float) -> Future[EmbedResult]:
        """Record the request and answer it."""
        self.requests.append(request)
        future: Future[EmbedResult] = Future()
        try:
            answer: Any = self._random_vectors(request) if self._handler is None else self._handler(request)
            if isinstance(answer, Future):
                return answer
            if not isinstance(answer, EmbedResult):
                words = [len(text.split()) for text in request.texts]
                vectors = np.asarray(answer, NUMBERS[request.embedding_type][1])
                answer = EmbedResult(vectors, np.array(words, np.int32), np.zeros(len(words), np.bool_))
            future.set_result(request.checked(answer))
        except NVEmbedError as error:
            future.set_exception(error)
        return future

    def is_ready(self, timeout_seconds: float) -> Future[bool]:
        """Answer `ready`."""
        return _done(self.ready)

    def model_info(self, timeout_seconds: float) -> Future[ModelInfo | None]:
        """Answer `info`."""
        return _done(self.info)

    def _random_vectors(self, request: EmbedRequest) -> Embeddings:
        rows = np.empty((len(request.texts), self._dimension), np.float32)
        for row, text in zip(rows, request.texts, strict=True):
            text_as_seen = f"{request.input_type} {request.instruction} {text}".encode(errors="surrogatepass")
            seed = hashlib.blake2b(text_as_seen, digest_size=8).digest()
            numbers = np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(self._dimension)
            row[:] = numbers / np.linalg.norm(numbers)
        return packed(rows, request.embedding_type)


def _mock_info(dimension: int) -> ModelInfo:
    """As a server with default settings tells it."""
    return ModelInfo(
        name="nv-embed-v2", kind="mock", fingerprint="0" * 32, dimension=dimension, pooling="mean",
        dtype="float32", device="cpu",
        query_prompt=QUERY_INSTRUCTION, document_prompt="", max_sequence_tokens=32768, max_request_documents=16384,
        max_request_bytes=2**26, max_queue_bytes=2**28, max_queue_tokens=4_000_000, max_queue_texts=131_072,
        max_queue_milliseconds=60_000,
    )  # fmt: skip


def _done(result: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(result)
    return future
