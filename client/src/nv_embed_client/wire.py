"""The server's tensors, parameters and error codes; the only file that knows them. Sends nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from nv_embed_client.errors import (
    AccessDenied,
    DeadlineExceeded,
    InvalidInput,
    ModelNotFound,
    NVEmbedError,
    ServerFailure,
    Unavailable,
)


@dataclass(frozen=True, slots=True, eq=False)
class EmbedResult:
    """What a call gives back."""

    embeddings: npt.NDArray[np.float32]
    """[n, dim], rows of length 1, in input order."""
    token_counts: npt.NDArray[np.int32] | None
    """[n], tokens of each text as the network saw it, instruction included; None when they were not asked for."""


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One request: what `infer` of either tritonclient is called with."""

    input_name: str  # query or documents
    texts: Sequence[bytes]
    parameters: Mapping[str, str]
    with_token_counts: bool

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `infer`, without those of the connection."""
        array = np.array(self.texts, dtype=np.object_)
        if self.input_name == "documents":
            array = array.reshape(1, -1)
        tensor = InferInput(self.input_name, list(array.shape), "BYTES")
        tensor.set_data_from_numpy(array)
        names = ["embeddings", "token_counts"] if self.with_token_counts else ["embeddings"]
        return {
            "inputs": [tensor],
            "outputs": [InferRequestedOutput(name) for name in names],
            "parameters": dict(self.parameters),
        }

    def decode(self, reply: Any) -> EmbedResult:
        """The arrays of a reply, views of its buffer.

        Raises:
            ServerFailure: they are not what this request must be answered with.
        """
        embeddings = reply.as_numpy("embeddings")
        token_counts = reply.as_numpy("token_counts") if self.with_token_counts else None
        num_texts = len(self.texts)
        if embeddings is None or embeddings.ndim != 2 or len(embeddings) != num_texts or embeddings.dtype != np.float32:
            got = "none" if embeddings is None else f"{embeddings.dtype} {list(embeddings.shape)}"
            raise ServerFailure(
                f"expected embeddings of {num_texts} texts as float32 [{num_texts}, dim]; got {got}; "
                "check that the server serves NV-Embed-v2 under this model name"
            )
        if self.with_token_counts and (token_counts is None or token_counts.shape != (num_texts,)):
            raise ServerFailure(f"expected {num_texts} token counts; got others; update the server")
        return EmbedResult(embeddings, token_counts)


def error_of(raw: InferenceServerException) -> NVEmbedError:
    """The typed error of what tritonclient raised."""
    code = str(raw.status() or "").removeprefix("StatusCode.")
    message = str(raw.message() or code or "no message")
    match code:
        case "INVALID_ARGUMENT":
            return InvalidInput(message)
        case "DEADLINE_EXCEEDED":
            return DeadlineExceeded(
                "expected an answer in the time the request was given; got none; give it more, or make it smaller"
            )
        # Triton says so with UNAVAILABLE; asking again would not help.
        case "UNAVAILABLE" if "restricted" in message:
            return AccessDenied(f"{message}; pass it in `headers`")
        case "UNAUTHENTICATED" | "PERMISSION_DENIED":
            return AccessDenied(message)
        case "UNAVAILABLE":
            return Unavailable(message)
        # While Triton drains, 24.10 answers as if its model had never been loaded, and 25.05 and later cancel.
        case "NOT_FOUND" if "no available versions" in message:
            return Unavailable(f"the server is stopping, or its model is not loaded yet: {message}")
        case "CANCELLED":
            return Unavailable(f"the server is stopping: {message}")
        case "NOT_FOUND":
            return ModelNotFound(message)
        case _:
            return ServerFailure(f"{code}: {message}" if code else message)
