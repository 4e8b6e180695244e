"""A request and its result, and the server's tensors, parameters and error codes; no other file knows these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

from nv_embed_client.embedding_type import NUMBERS, Embeddings, EmbeddingType
from nv_embed_client.errors import (
    AccessDenied,
    DeadlineExceeded,
    InvalidInput,
    ModelNotFound,
    NVEmbedError,
    ServerFailure,
    ServerTooOld,
    Unavailable,
)
from nv_embed_client.instructions import QUERY_INSTRUCTION
from nv_embed_client.model_info import ModelInfo

InputType: TypeAlias = Literal["query", "passage"]
Truncate: TypeAlias = Literal["END", "NONE"]


@dataclass(frozen=True, slots=True, eq=False)
class EmbedResult:
    """What a call gives back."""

    embeddings: Embeddings
    """In input order; the rows of float32 have length 1."""
    token_counts: npt.NDArray[np.int32] | None
    """[n], tokens of each text as the network saw it, instruction included; None when they were not asked for."""
    is_truncated: npt.NDArray[np.bool_] | None = None
    """[n], whether each text was too long and was cut; None when it was not asked for."""


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """One request, a part of a call or all of it."""

    texts: tuple[str, ...]
    input_type: InputType = "passage"
    instruction: str | None = None
    """None: the model's standard instruction for queries, nothing for passages."""
    truncate: Truncate = "END"
    token_counts: bool = False
    query_prompt: str = QUERY_INSTRUCTION
    """What the server puts before a query. Several queries in one request need it, see `needs_query_prompt`."""
    embedding_type: EmbeddingType = "float"
    is_truncated: bool = False

    @property
    def needs_query_prompt(self) -> bool:
        """Whether it is sent as documents with the query's instruction, because a request holds at most one `query`."""
        return self.input_type == "query" and self.instruction is None and len(self.texts) > 1

    def message(self, model_name: str) -> Any:
        """This request as a message of Triton's protocol."""
        instruction = self.query_prompt if self.needs_query_prompt else self.instruction
        is_query = self.input_type == "query" and len(self.texts) == 1
        message = _message(model_name, "query" if is_query else "documents", self.texts)
        for name in self._outputs:
            message.outputs.add(name=name)
        if instruction is not None:
            message.parameters["instruction"].string_param = instruction
        if self.truncate != "END":
            message.parameters["truncate"].string_param = self.truncate
        if self.embedding_type != "float":
            message.parameters["embedding_type"].string_param = self.embedding_type
        if self.is_truncated:
            message.parameters["is_truncated"].bool_param = True
        return message

    def result(self, reply: Any) -> EmbedResult:
        """The arrays of Triton's reply, views of its buffers.

        Raises:
            ServerFailure: they cannot be the answer to this request.
        """
        arrays: dict[str, npt.NDArray[Any]] = {}
        for output, content in zip(reply.outputs, reply.raw_output_contents, strict=False):
            datatype, dtype = self._outputs.get(output.name, (None, None))
            if datatype == output.datatype:
                arrays[output.name] = np.frombuffer(content, dtype).reshape(tuple(output.shape))
        empty = np.empty(0, np.float32)
        vectors = arrays.get(_output_of(self.embedding_type), empty)
        return self.checked(EmbedResult(vectors, arrays.get("token_counts"), arrays.get("is_truncated")))

    def checked(self, result: EmbedResult) -> EmbedResult:
        """The same result, if it can be the answer to this request.

        Raises:
            ServerFailure: it cannot.
        """
        embeddings, num_texts = result.embeddings, len(self.texts)
        dtype = np.dtype(NUMBERS[self.embedding_type][1])
        if embeddings.ndim != 2 or len(embeddings) != num_texts or embeddings.dtype != dtype:
            raise ServerFailure(
                f"expected embeddings of {num_texts} texts as {dtype} [{num_texts}, dim]; got {embeddings.dtype} "
                f"{list(embeddings.shape)}; check that the server serves NV-Embed-v2 under this model name"
            )
        for name, asked in (("token_counts", self.token_counts), ("is_truncated", self.is_truncated)):
            numbers: npt.NDArray[Any] | None = getattr(result, name)
            if asked and (numbers is None or numbers.shape != (num_texts,)):
                raise ServerFailure(f"expected {name} of {num_texts} texts; got others; update the server")
        return result

    @property
    def _outputs(self) -> dict[str, tuple[str, npt.DTypeLike]]:
        """What is asked for, by the server's names, and the numbers that it has, by the server's and numpy's name."""
        outputs = {_output_of(self.embedding_type): NUMBERS[self.embedding_type]}
        if self.token_counts:
            outputs["token_counts"] = ("INT32", np.int32)
        if self.is_truncated:
            outputs["is_truncated"] = ("BOOL", np.bool_)
        return outputs


def model_info_message(model_name: str) -> Any:
    """The request that asks for the model's description alone; the server answers it at once."""
    message = _message(model_name, "documents", ("",))
    message.outputs.add(name="model_info")
    message.parameters["model_info"].bool_param = True
    return message


def model_info_of(reply: Any) -> ModelInfo | None:
    """The description in Triton's reply; None if the server sent none.

    Raises:
        ServerFailure: it is none of a model.
    """
    for output, content in zip(reply.outputs, reply.raw_output_contents, strict=False):
        if output.name == "model_info":
            return ModelInfo.of_json(content[4:])  # behind its length
    return None


def _output_of(embedding_type: EmbeddingType) -> str:
    return "embeddings" if embedding_type == "float" else f"embeddings_{embedding_type}"


def _message(model_name: str, input_name: str, texts: Sequence[str]) -> Any:
    message = service_pb2.ModelInferRequest(model_name=model_name)
    shape = [len(texts)] if input_name == "query" else [1, len(texts)]
    message.inputs.add(name=input_name, datatype="BYTES", shape=shape)
    encoded = [text.encode() for text in texts]
    message.raw_input_contents.append(b"".join(len(text).to_bytes(4, "little") + text for text in encoded))
    return message


def error_of(code: str, message: str) -> NVEmbedError:
    """The typed error of a gRPC status.

    Args:
        code: its name, such as UNAVAILABLE.
        message: its details.
    """
    message = message or code
    match code:
        case "INVALID_ARGUMENT" if "unexpected inference output" in message:
            return ServerTooOld(
                f"expected a server that knows what is asked for; got: {message}; leave it out, or have the server's "
                "operator update the server, or the outputs in this model's config.pbtxt"
            )
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
            return ModelNotFound(
                f"expected the name of a model that the server has; got: {message}; correct it: the server's metrics, "
                'by default at port 8002, name each model as model="..."'
            )
        case _:
            return ServerFailure(f"{code}: {message}")
