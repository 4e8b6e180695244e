"""Raw input arrays to an `EmbedRequest`, or `InvalidRequest`; knows neither the tokenizer nor Triton.

An `EmbedRequest` in hand is the proof that its texts are valid UTF-8 and within the limits on documents and bytes.
Limits in tokens are the tokenizer's, because only it can count them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import Any

from nv_embed.embedding_type import EmbeddingType
from nv_embed.errors import InvalidRequest

# Proxies and Triton itself put these beside the caller's own parameters.
_FOREIGN_PARAMETERS = ("x-", "traceparent", "triton")
_OF_VECTORS = frozenset(each.output for each in EmbeddingType)
# All that an answer may have.
OUTPUTS = _OF_VECTORS | {"token_counts", "is_truncated", "model_info"}
# Of parameters with few values: what each means, and what to do about others.
_CHOICES: dict[str, tuple[dict[str, object], str]] = {
    "truncate": (
        {"END": True, "NONE": False},
        "send 'END' to cut a text that is too long, 'NONE' to have it refused",
    ),
    "embedding_type": (
        {each.value: each for each in EmbeddingType},
        "send one of these, or leave it out for float32",
    ),
}


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What one request may hold."""

    max_request_documents: int
    max_request_bytes: int


@dataclass(frozen=True, slots=True)
class Instructions:
    """The model's own, for requests that name none."""

    query: str
    documents: str


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """One valid request: texts in input order, and how to embed them."""

    texts: tuple[str, ...]
    instruction: str  # stands before every text; may be empty
    truncate: bool  # False: a text over the limit is refused
    is_query: bool
    num_bytes: int  # of UTF-8, the instruction counted once for each text
    timeout_seconds: float | None = None  # the caller's own limit, from arrival to answer
    model_info: bool = False  # whether the answer also describes the model
    embedding_type: EmbeddingType = EmbeddingType.FLOAT
    is_truncated: bool = False  # whether the answer also says which texts were cut

    @classmethod
    def parse(
        cls,
        query: Sequence[bytes] | None,
        documents: Sequence[bytes] | None,
        parameters: Mapping[str, object],
        limits: RequestLimits,
        instructions: Instructions,
        timeout_seconds: float | None = None,
    ) -> EmbedRequest:
        """Check one request.

        Args:
            query: the elements of input `query`, one; None when the input is absent.
            documents: the elements of input `documents`, N; None when the input is absent.
            parameters: the request's parameters, as the client sent them.
            limits: what one request may hold.
            instructions: what stands before a text when the parameters do not say.
            timeout_seconds: the caller's own limit, None or 0 for none.

        Raises:
            InvalidRequest: with what was expected, what came and what to do.
        """
        if (query is None) == (documents is None):
            raise InvalidRequest.of(
                expected="exactly one of the inputs 'query' and 'documents'",
                got="neither" if query is None else "both",
                remedy="send one of them" if query is None else "for both kinds send two requests",
            )
        raw = query if query is not None else documents
        assert raw is not None
        if len(raw) == 0:
            raise InvalidRequest.of(
                expected="at least 1 document",
                got="0",
                remedy="leave out the request when there is nothing to embed",
            )
        if len(raw) > limits.max_request_documents:
            raise InvalidRequest.of(
                expected=f"at most {limits.max_request_documents} documents a request",
                got=str(len(raw)),
                remedy="split the documents over several requests",
            )
        default = instructions.query if query is not None else instructions.documents
        asked = _Parameters.parse(parameters, default)
        num_bytes = sum(map(len, raw)) + len(raw) * len(asked.instruction.encode())
        if num_bytes > limits.max_request_bytes:
            raise InvalidRequest.of(
                expected=f"at most {limits.max_request_bytes} bytes of text a request, "
                "the instruction counted once for each text",
                got=f"{num_bytes} bytes",
                remedy="split the request, or shorten its texts",
            )
        return cls(
            _decode(raw), asked.instruction, asked.truncate, query is not None, num_bytes,
            timeout_seconds or None, asked.model_info, asked.embedding_type, asked.is_truncated,
        )  # fmt: skip

    def check_outputs(self, named: Set[str], declared: Set[str]) -> None:
        """Raise InvalidRequest unless there can be an answer with the outputs that are asked for.

        Args:
            named: by the client; the same as `declared` if it names none.
            declared: those in the model's config.pbtxt.
        """
        own = self.embedding_type.output
        for output in (own, *(["is_truncated"] if self.is_truncated else [])):
            if output not in declared:
                raise InvalidRequest.of(
                    expected=f"a model whose config.pbtxt declares the output {output!r}",
                    got="one whose config.pbtxt is older",
                    remedy="leave out the parameter that asks for it, or have the server's operator add the model anew",
                )
        others = _OF_VECTORS & named - {own}
        if others and named != declared:
            raise InvalidRequest.of(
                expected=f"{own!r} as the only output with vectors, because 'embedding_type' is "
                f"{self.embedding_type.value!r}",
                got=", ".join(map(repr, sorted(others))),
                remedy=f"name {own!r}, or send another 'embedding_type'",
            )


def _decode(raw: Sequence[bytes]) -> tuple[str, ...]:
    texts = []
    for index, element in enumerate(raw):
        try:
            texts.append(element.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InvalidRequest.of(
                expected="text in UTF-8",
                got=f"text {index} with an invalid byte at position {error.start} of {len(element)}",
                remedy="encode it as UTF-8",
            ) from None
    return tuple(texts)


@dataclass(frozen=True, slots=True)
class _Parameters:
    """What a request's parameters say, each by its name."""

    instruction: str
    truncate: bool = True
    embedding_type: EmbeddingType = EmbeddingType.FLOAT
    is_truncated: bool = False
    model_info: bool = False

    @classmethod
    def parse(cls, parameters: Mapping[str, object], default_instruction: str) -> _Parameters:
        """Raises InvalidRequest."""
        said: dict[str, Any] = {"instruction": default_instruction}
        for name, value in parameters.items():
            if name == "instruction":
                said[name] = _parse_text(name, value)
            elif name in _CHOICES:
                said[name] = _parse_choice(name, value)
            elif name in ("is_truncated", "model_info"):
                said[name] = _parse_bool(name, value)
            elif not name.lower().startswith(_FOREIGN_PARAMETERS):
                raise InvalidRequest.of(
                    expected=f"only the request parameters {_listed([field.name for field in fields(cls)], 'and')}",
                    got=_clipped(name),
                    remedy="leave it out, or correct its name",
                )
        return cls(**said)


def _parse_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequest.of(
            expected=f"a string as request parameter {name!r}",
            got=f"a value of type {type(value).__name__}",
            remedy="send it as a string",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON over HTTP can spell half a surrogate pair
        raise InvalidRequest.of(
            expected=f"valid Unicode as request parameter {name!r}",
            got=f"an unpaired surrogate at position {error.start}",
            remedy="correct it",
        ) from None
    return value


def _parse_choice(name: str, value: object) -> object:
    choices, remedy = _CHOICES[name]
    text = _parse_text(name, value)
    if text not in choices:
        raise InvalidRequest.of(
            expected=f"{_listed(choices, 'or')} as request parameter {name!r}", got=_clipped(text), remedy=remedy
        )
    return choices[text]


def _parse_bool(name: str, value: object) -> bool:
    # Some clients can send nothing but strings.
    if not isinstance(value, bool) and value not in ("true", "false"):
        raise InvalidRequest.of(
            expected=f"true or false as request parameter {name!r}",
            got=_clipped(value) if isinstance(value, str) else f"a value of type {type(value).__name__}",
            remedy="send it as a boolean, or leave it out",
        )
    return value in (True, "true")


def _listed(names: Iterable[str], word: str) -> str:
    """'a', 'b' and 'c'."""
    *first, last = map(repr, names)
    return f"{', '.join(first)} {word} {last}"


def _clipped(value: str) -> str:
    """Enough of a value to recognise it by, in ASCII: whatever a client sends, logs stay readable."""
    return ascii(value if len(value) <= 40 else value[:40] + "...")
