"""A request and its result, and the server's tensors, parameters and error codes; no other file knows these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

from nv_embed_client.errors import (
    AccessDenied,
    DeadlineExceeded,
    InvalidInput,
    ModelNotFound,
    NVEmbedError,
    ServerFailure,
    Unavailable,
)
from nv_embed_client.instructions import QUERY_INSTRUCTION

InputType: TypeAlias = Literal["query", "passage"]
Truncate: TypeAlias = Literal["END", "NONE"]


@dataclass(frozen=True, slots=True, eq=False)
class EmbedResult:
    """What a call gives back."""

    embeddings: npt.NDArray[np.float32]
    """[n, dim], rows of length 1, in input order."""
    token_counts: npt.NDArray[np.int32] | None
    """[n], tokens of each text as the network saw it, instruction included; None when they were not asked for."""


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """One request, a part of a call or all of it."""

    texts: tuple[str, ...]
    input_type: InputType = "passage"
    instruction: str | None = None
    """None: the model's standard instruction for queries, nothing for passages."""
    truncate: Truncate = "END"
    token_counts: bool = False

    def message(self, model_name: str) -> Any:
        """This request as a message of Triton's protocol."""
        input_name, instruction = "documents", self.instruction
        if self.input_type == "query":
            if len(self.texts) == 1:
                input_name = "query"
            elif instruction is None:
                # A request holds at most one `query`. Documents with the query's instruction get the same vectors.
                instruction = QUERY_INSTRUCTION
        message = service_pb2.ModelInferRequest(model_name=model_name)
        num_texts = len(self.texts)
        message.inputs.add(
            name=input_name, datatype="BYTES", shape=[num_texts] if input_name == "query" else [1, num_texts]
        )
        encoded = [text.encode() for text in self.texts]
        message.raw_input_contents.append(b"".join(len(text).to_bytes(4, "little") + text for text in encoded))
        for name in ["embeddings", "token_counts"] if self.token_counts else ["embeddings"]:
            message.outputs.add(name=name)
        if instruction is not None:
            message.parameters["instruction"].string_param = instruction
        if self.truncate != "END":
            message.parameters["truncate"].string_param = self.truncate
        return message

    def result(self, reply: Any) -> EmbedResult:
        """The arrays of Triton's reply, views of its buffers.

        Raises:
            ServerFailure: they cannot be the answer to this request.
        """
        arrays: dict[str, npt.NDArray[Any]] = {}
        types = {"embeddings": ("FP32", np.float32), "token_counts": ("INT32", np.int32)}
        for output, content in zip(reply.outputs, reply.raw_output_contents, strict=False):
            datatype, dtype = types.get(output.name, (None, None))
            if datatype == output.datatype:
                arrays[output.name] = np.frombuffer(content, dtype).reshape(tuple(output.shape))
        empty = np.empty(0, np.float32)
        return self.checked(EmbedResult(arrays.get("embeddings", empty), arrays.get("token_counts")))

    def checked(self, result: EmbedResult) -> EmbedResult:
        """The same result, if it can be the answer to this request.

        Raises:
            ServerFailure: it cannot.
        """
        embeddings, num_texts = result.embeddings, len(self.texts)
        if embeddings.ndim != 2 or len(embeddings) != num_texts or embeddings.dtype != np.float32:
            raise ServerFailure(
                f"expected embeddings of {num_texts} texts as float32 [{num_texts}, dim]; got {embeddings.dtype} "
                f"{list(embeddings.shape)}; check that the server serves NV-Embed-v2 under this model name"
            )
        if self.token_counts and (result.token_counts is None or result.token_counts.shape != (num_texts,)):
            raise ServerFailure(f"expected {num_texts} token counts; got others; update the server")
        return result


def error_of(code: str, message: str) -> NVEmbedError:
    """The typed error of a gRPC status.

    Args:
        code: its name, such as UNAVAILABLE.
        message: its details.
    """
    message = message or code
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
            return ServerFailure(f"{code}: {message}")
