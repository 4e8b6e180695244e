"""Raw input arrays to an `EmbedRequest`, or `InvalidRequest`; knows neither the tokenizer nor Triton.

An `EmbedRequest` in hand is the proof that its texts are valid UTF-8 and within the limits on documents and bytes.
Limits in tokens are the tokenizer's, because only it can count them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nv_embed.errors import InvalidRequest

# Proxies and Triton itself put these beside the caller's own parameters.
_FOREIGN_PARAMETERS = ("x-", "traceparent", "triton")


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
            parameters: the request's parameters: `instruction`, `truncate` and `model_info`.
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
        instruction, truncate, model_info = _parse_parameters(parameters, default)
        num_bytes = sum(map(len, raw)) + len(raw) * len(instruction.encode())
        if num_bytes > limits.max_request_bytes:
            raise InvalidRequest.of(
                expected=f"at most {limits.max_request_bytes} bytes of text a request, "
                "the instruction counted once for each text",
                got=f"{num_bytes} bytes",
                remedy="split the request, or shorten its texts",
            )
        timeout = timeout_seconds or None
        return cls(_decode(raw), instruction, truncate, query is not None, num_bytes, timeout, model_info)


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


def _parse_parameters(parameters: Mapping[str, object], default_instruction: str) -> tuple[str, bool, bool]:
    instruction, truncate, model_info = default_instruction, "END", False
    for name, value in parameters.items():
        if name not in ("instruction", "truncate", "model_info"):
            if name.lower().startswith(_FOREIGN_PARAMETERS):
                continue
            raise InvalidRequest.of(
                expected="only the request parameters 'instruction', 'truncate' and 'model_info'",
                got=_clipped(name),
                remedy="leave it out, or correct its name",
            )
        if name == "model_info":
            model_info = _parse_bool(name, value)
            continue
        if not isinstance(value, str):
            raise InvalidRequest.of(
                expected=f"a string as request parameter {name!r}",
                got=f"a value of type {type(value).__name__}",
                remedy="send it as a string",
            )
        if name == "instruction":
            instruction = value
        else:
            truncate = value
    if truncate not in ("END", "NONE"):
        raise InvalidRequest.of(
            expected="'END' or 'NONE' as request parameter 'truncate'",
            got=_clipped(truncate),
            remedy="send 'END' to cut a text that is too long, 'NONE' to have it refused",
        )
    try:
        instruction.encode()
    except UnicodeEncodeError as error:  # JSON over HTTP can spell half a surrogate pair
        raise InvalidRequest.of(
            expected="valid Unicode as request parameter 'instruction'",
            got=f"an unpaired surrogate at position {error.start}",
            remedy="correct it",
        ) from None
    return instruction, truncate == "END", model_info


def _parse_bool(name: str, value: object) -> bool:
    # Some clients can send nothing but strings.
    if not isinstance(value, bool) and value not in ("true", "false"):
        raise InvalidRequest.of(
            expected=f"true or false as request parameter {name!r}",
            got=_clipped(value) if isinstance(value, str) else f"a value of type {type(value).__name__}",
            remedy="send it as a boolean, or leave it out",
        )
    return value in (True, "true")


def _clipped(value: str) -> str:
    """Enough of a value to recognise it by, in ASCII: whatever a client sends, logs stay readable."""
    return ascii(value if len(value) <= 40 else value[:40] + "...")
