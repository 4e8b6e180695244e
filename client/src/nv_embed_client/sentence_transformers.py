"""`NVEmbedEncoder`: takes the place of a `SentenceTransformer` in code that encodes and compares.

The module's name is part of the class's, and BERTopic and KeyBERT look for it there. Because of it they refuse the
encoder; otherwise they would silently embed with a model of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from nv_embed_client.client import NVEmbedClient
from nv_embed_client.embedding_type import Embeddings
from nv_embed_client.errors import InvalidInput
from nv_embed_client.extras import needs_extra
from nv_embed_client.instructions import (
    DOCUMENT_INSTRUCTIONS,
    QUERY_INSTRUCTION,
    TASK_INSTRUCTIONS,
    checked_instruction,
)

if TYPE_CHECKING:
    import torch

    Encoded: TypeAlias = Embeddings | torch.Tensor | list[torch.Tensor]

Precision: TypeAlias = Literal["float32", "int8", "uint8", "binary", "ubinary"]

# What the published model has. A server may have another one; then these names mean that.
_STANDARD = {"query": QUERY_INSTRUCTION, "document": ""}


class NVEmbedEncoder:
    """The methods of `SentenceTransformer` that use a model, over the network.

    model = NVEmbedEncoder("localhost:8001")
    model.similarity(model.encode_query("..."), model.encode_document(["...", "..."]))

    Vectors have length 1 and are float32, unless `precision` says otherwise. A prompt is the model's instruction: it
    stands before each text and is left out of the pooling, as the published model has it.

    Attributes:
        prompts: by name: "query" is the standard instruction, "document" is none, the others are the published
            ones, by MTEB's name of the task. Those two stand for the served model's own, until they are replaced.
    """

    similarity_fn_name: Literal["cosine"] = "cosine"

    def __init__(
        self,
        client: NVEmbedClient | str = "localhost:8001",
        *,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
    ) -> None:
        """
        Args:
            client: a client, which stays its owner's to close, or the gRPC address for one of this encoder's own.
            prompts: added to the published ones, or replacing them.
            default_prompt_name: of `encode` when it is given neither `prompt_name` nor `prompt`; None: no prompt.
        """
        self._owns_client = isinstance(client, str)
        self.client = NVEmbedClient(client) if isinstance(client, str) else client
        self.prompts: dict[str, str] = {
            **_STANDARD,
            **TASK_INSTRUCTIONS,
            **{f"{task}-document": instruction for task, instruction in DOCUMENT_INSTRUCTIONS.items()},
            **(prompts or {}),
        }
        for prompt in self.prompts.values():
            checked_instruction(prompt)
        self.default_prompt_name = default_prompt_name
        self.model_card_data = EvaluationRecord()

    def encode(
        self,
        sentences: str | Sequence[str] | npt.NDArray[np.str_],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding"] = "sentence_embedding",
        precision: Precision | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | None = None,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
    ) -> Encoded:
        """Embed one text or many.

        Args:
            sentences: one text, or texts.
            prompt_name: a key of `prompts`.
            prompt: the instruction itself; goes before `prompt_name`.
            batch_size: texts in one request; the server forms its own batches.
            show_progress_bar: None is False.
            output_value: only "sentence_embedding": the server has no others.
            precision: as in the original, but the steps of "int8" and "uint8" are the same in every call.
            convert_to_numpy: False for a list of tensors.
            convert_to_tensor: True for one tensor, on the CPU; goes before `convert_to_numpy`.
            device: ignored; the server knows its own.
            normalize_embeddings: ignored; they always are.
            truncate_dim: only None: parts of these vectors mean nothing.

        Returns:
            [dim] for one text, [n, dim] for n; of signs a byte for eight.

        Raises:
            InvalidInput: an argument this model cannot honour.
            NVEmbedError: as `NVEmbedClient.embed`.
        """
        del device, normalize_embeddings
        if output_value != "sentence_embedding":
            raise InvalidInput.of(
                expected="output_value 'sentence_embedding'", got=repr(output_value), remedy="leave it out"
            )
        if precision not in (None, *get_args(Precision)):
            raise InvalidInput.of(
                expected=f"one of {', '.join(map(repr, get_args(Precision)))} as precision",
                got=repr(precision),
                remedy="correct it",
            )
        if truncate_dim is not None:
            raise InvalidInput.of(
                expected="no truncate_dim, as NV-Embed-v2 was not trained to be cut",
                got=str(truncate_dim),
                remedy="leave it out",
            )
        single = isinstance(sentences, str)
        texts: Iterable[str] = [sentences] if isinstance(sentences, str) else [_as_str(text) for text in sentences]
        name = None if prompt is not None else prompt_name if prompt_name is not None else self.default_prompt_name
        is_own = name in _STANDARD and self.prompts[name] == _STANDARD[name]
        embeddings = self.client.embed(
            texts,
            input_type="query" if is_own and name == "query" else "passage",
            instruction=None if is_own else self._instruction(name, prompt),
            progress=bool(show_progress_bar),
            max_texts_per_request=batch_size,
            embedding_type="float" if precision is None or precision == "float32" else precision,
        ).embeddings
        if convert_to_tensor or not convert_to_numpy:
            tensor: torch.Tensor = _torch().from_numpy(embeddings)
            if single:
                return tensor[0]
            return tensor if convert_to_tensor else list(tensor)
        return embeddings[0] if single else embeddings

    def encode_query(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        **arguments: Any,
    ) -> Encoded:
        """`encode` with the prompt "query" unless another is given."""
        if prompt_name is None and prompt is None:
            prompt_name = "query"
        return self.encode(sentences, prompt_name, prompt, **arguments)

    def encode_document(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        **arguments: Any,
    ) -> Encoded:
        """`encode` with the prompt "document", which is none, unless another is given."""
        if prompt_name is None and prompt is None:
            prompt_name = "document"
        return self.encode(sentences, prompt_name, prompt, **arguments)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosines of all pairs: [n, dim] or [dim] each, arrays or tensors, to [n1, n2]."""
        return _unit_rows(embeddings1) @ _unit_rows(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosines of corresponding rows: [n, dim] each to [n]."""
        return (_unit_rows(embeddings1) * _unit_rows(embeddings2)).sum(dim=1)

    def get_sentence_embedding_dimension(self) -> int:
        """The length of a vector; asks the server once."""
        return self.client.dimension()

    get_embedding_dimension = get_sentence_embedding_dimension

    def close(self) -> None:
        """Close the client if it is this encoder's own."""
        if self._owns_client:
            self.client.close()

    def __enter__(self) -> NVEmbedEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _instruction(self, name: str | None, prompt: str | None) -> str | None:
        if name is None:
            return prompt
        if name not in self.prompts:
            raise InvalidInput.of(
                expected="the name of a prompt",
                got=repr(name),
                remedy=f"use one of {sorted(self.prompts)}, or pass the text as prompt=",
            )
        return self.prompts[name]


class EvaluationRecord:
    """What sentence-transformers' evaluators report to a model's card.

    Attributes:
        metrics: of the last evaluation, by name.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}

    def set_evaluation_metrics(self, evaluator: object, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:
        """Called by an evaluator when it is done."""
        self.metrics = dict(metrics)


def _as_str(text: str) -> str:
    return str(text) if isinstance(text, np.str_) else text


def _unit_rows(embeddings: Any) -> torch.Tensor:
    library = _torch()
    if isinstance(embeddings, list) and embeddings and isinstance(embeddings[0], library.Tensor):
        embeddings = library.stack(embeddings)
    tensor = library.as_tensor(embeddings)
    if tensor.ndim == 1:
        tensor = tensor.unsqueeze(0)
    unit: torch.Tensor = library.nn.functional.normalize(tensor.float(), dim=1)
    return unit


def _torch() -> Any:
    with needs_extra("sentence-transformers"):
        import torch
    return torch
