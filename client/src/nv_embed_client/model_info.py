"""What a server says about the model that it serves."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace

from nv_embed_client.errors import InvalidInput, ServerFailure


@dataclass(frozen=True, slots=True)
class Identity:
    """What is kept with vectors: two sets of them can be compared if all but the name is the same."""

    name: str
    fingerprint: str
    dimension: int
    document_prompt: str

    def __str__(self) -> str:
        prompt = f" and the document prompt {self.document_prompt!r}" if self.document_prompt else ""
        return f"{self.name} with fingerprint {self.fingerprint}, {self.dimension} dimensions{prompt}"

    def check(self, other: Identity, where: str) -> None:
        """
        Args:
            other: the model that is served now.
            where: what holds vectors of this model.

        Raises:
            InvalidInput: vectors of the two cannot be compared. A model may be served under several names.
        """
        if replace(other, name=self.name) != self:
            raise InvalidInput.of(
                expected=f"the model whose vectors {where} holds: {self}",
                got=str(other),
                remedy="give the address of a server with that model, or choose another place for vectors of this one",
            )


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model, as it is served now. Fields that are named as a setting of the server hold its value in force."""

    name: str
    """As Triton knows the model."""
    kind: str
    """Of its checkpoint."""
    fingerprint: str
    """Of its checkpoint's files: the same on every machine, another one for other weights, tokenizer or config."""
    dimension: int
    """Numbers of a vector."""
    pooling: str
    """How the vectors of tokens become one, such as 'mean', 'cls' or 'lasttoken'."""
    dtype: str
    """The precision it computes in; several, separated by commas, if its devices differ."""
    device: str
    """Where it runs, separated by commas."""
    query_prompt: str
    """Stands before a query whose request names no instruction."""
    document_prompt: str
    """The same for a document."""
    max_sequence_tokens: int
    """Of the longest text that is not cut, its instruction included."""
    max_request_documents: int
    """Texts of one request."""
    max_request_bytes: int
    """Of UTF-8 in one request, the instruction counted once for each text."""
    max_queue_bytes: int
    """Of texts that wait to be tokenized."""
    max_queue_tokens: int
    """Of texts that wait to be computed; no request may have more."""
    max_queue_texts: int
    """Of requests that are not answered yet."""
    max_queue_milliseconds: int
    """That a request may wait for its first batch."""

    @property
    def identity(self) -> Identity:
        """What is kept with its vectors."""
        return Identity(self.name, self.fingerprint, self.dimension, self.document_prompt)

    @classmethod
    def of_json(cls, text: bytes | str) -> ModelInfo:
        """What the server sent. Fields that this version does not know are left out.

        Raises:
            ServerFailure: it cannot be a description of a model.
        """
        try:
            told = json.loads(text)
            info = cls(**{each.name: told[each.name] for each in fields(cls)})
        except (ValueError, TypeError, KeyError) as error:
            raise _failure(repr(error)) from None
        for each in fields(cls):
            value = getattr(info, each.name)
            if type(value).__name__ != each.type:
                raise _failure(f"{each.name} of type {type(value).__name__} and not {each.type}")
        return info


def _failure(got: str) -> ServerFailure:
    return ServerFailure(
        f"expected model_info as JSON with {', '.join(each.name for each in fields(ModelInfo))}; got {got[:200]}; "
        "update the server, or this client"
    )
