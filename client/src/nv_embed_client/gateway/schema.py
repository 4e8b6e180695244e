"""What goes over the wire, as the OpenAI API has it, with the few additions that an embedding model needs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from nv_embed_client.embedding_type import EmbeddingType
from nv_embed_client.gateway.names import PROMPTS

_INPUT_EXAMPLES = ["The food was delicious.", ["first text", "second text"]]
_KINDS = {bool: "a boolean", int: "a number", float: "a number", dict: "an object", list: "a list", type(None): "null"}

Texts = Annotated[
    str | Annotated[list[str], Field(min_length=1)],
    Field(description="One text or a list of texts.", examples=_INPUT_EXAMPLES),
]
Dimensions = Annotated[
    int | None,
    Field(
        description="Of each vector; only the model's own number. It was not trained so that a part of its vectors "
        "means anything."
    ),
]
PromptName = Annotated[
    str | None,
    Field(
        description="`query`, `document`, or MTEB's name of a task that the model was published with an instruction "
        "for; that instruction is put before each text.",
        json_schema_extra={"examples": ["SciFact"]},
    ),
]


def refused(code: str, *, expected: str, got: str, remedy: str) -> PydanticCustomError:
    """A value that is not accepted."""
    parts: dict[str, Any] = {"expected": expected, "got": got, "remedy": remedy}
    return PydanticCustomError(code, "expected {expected}; got {got}; {remedy}", parts)


def checked_texts(value: object) -> object:
    """`value` if it is one text or a list of them.

    Checked here, because the two forms of a union would each complain in their own words.
    """
    elements = value if isinstance(value, list) else [value]
    for index, element in enumerate(elements):
        if isinstance(element, str):
            continue
        where = f" as text {index}" if isinstance(value, list) else ""
        is_list_of = [type(each) for each in element] if isinstance(element, list) else []
        if (type(element) is int and isinstance(value, list)) or (is_list_of and set(is_list_of) == {int}):
            raise refused(
                "tokens",
                expected="texts",
                got=f"token ids{where}, which belong to another model's tokenizer",
                remedy="send the texts themselves (in LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False)",
            )
        remedy = {
            list: "send one flat list of texts",
            type(None): "leave it out, or send a text in its place",
        }.get(type(element), "send a text in its place")
        raise refused(
            "texts", expected="one text or a list of texts", got=f"{_KINDS[type(element)]}{where}", remedy=remedy
        )
    if not elements:
        raise refused(
            "texts", expected="one text or a list of texts", got="an empty list", remedy="send at least one text"
        )
    return value


def checked_prompt_name(value: str | None) -> str | None:
    """`value` if it is the name of a prompt."""
    if value is not None and value not in PROMPTS:
        raise refused(
            "prompt_name",
            expected=f"a prompt_name of {', '.join(PROMPTS)}",
            got=ascii(value)[:80],
            remedy="correct it, or send your own 'instruction' to /v1/embeddings",
        )
    return value


class EmbeddingsRequest(BaseModel):
    """Texts to embed."""

    # What is unknown is refused by the operation, unless the operator has it ignored.
    model_config = ConfigDict(extra="allow", strict=True)

    input: Texts
    model: Annotated[
        str | None,
        Field(
            description="A name of `/v1/models`; null or none is the first of them. With `-query` or `-passage` after "
            "it, it stands for `input_type` in clients that cannot send that."
        ),
    ] = None
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        Field(
            description="`base64`: the bytes of the vector's numbers, little-endian; they are float32 unless "
            "`embedding_type` says otherwise. null is `float`."
        ),
    ] = "float"
    input_type: Annotated[
        Literal["query", "passage"] | None,
        Field(
            description="A query has the model's instruction put before it; a passage has none. Without anything "
            "that says otherwise, texts are passages."
        ),
    ] = None
    instruction: Annotated[
        str | None,
        Field(
            description="Put before each text in place of the standard instruction, exactly as it is: the published "
            "form is `Instruct: <task>` and, on the next line, `Query: `, with a space at its end. It makes the "
            "texts queries.",
            json_schema_extra={"pattern": "^[^\\u0000]*$"},
        ),
    ] = None
    prompt_name: PromptName = None
    truncate: Annotated[
        Literal["END", "NONE"] | None,
        Field(
            description="What to do with a text that is too long for the model: cut its end, or refuse the request; "
            "null is `END`."
        ),
    ] = "END"
    dimensions: Dimensions = None
    embedding_type: Annotated[
        EmbeddingType | None,
        Field(
            description="Of the numbers, as NVIDIA's NIM has it, and `float16`. `int8` are steps of one size, and "
            "`uint8` the same + 128; `ubinary` are signs, eight in a byte, and `binary` the same bytes - 128. null is "
            "`float`."
        ),
    ] = None
    is_truncated: Annotated[
        bool | None, Field(description="Have each vector say whether its text was too long and was cut.")
    ] = None
    token_count: Annotated[
        bool | None, Field(description="Have each vector say how many tokens of its text the network saw.")
    ] = None
    modality: Annotated[
        Literal["text"] | list[Literal["text"]] | None,
        Field(description="Of all texts or of each, as NVIDIA's NIM has it."),
    ] = None
    user: Annotated[str | None, Field(description="Accepted and ignored.")] = None

    _texts = field_validator("input", mode="before")(checked_texts)
    _prompt_name = field_validator("prompt_name")(checked_prompt_name)

    @field_validator("instruction")
    @classmethod
    def _sendable(cls, value: str | None) -> str | None:
        for index, character in enumerate(value or ""):
            if character == "\0" or "\ud800" <= character <= "\udfff":
                raise refused(
                    "instruction",
                    expected="an instruction in Unicode without NUL, at which the server would cut it off",
                    got=f"{'NUL' if character == chr(0) else 'half a surrogate pair'} at position {index}",
                    remedy="take it out",
                )
        return value

    @field_validator("truncate", mode="before")
    @classmethod
    def _end_only(cls, value: object) -> object:
        if value == "START":
            raise refused(
                "truncate",
                expected="'END' or 'NONE' as truncate",
                got="'START', which this model's server cannot do",
                remedy="send 'END' to have a long text's end cut off, or cut its start yourself and send 'NONE'",
            )
        return value


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"]
    index: Annotated[int, Field(description="Of the text within `input`.")]
    embedding: Annotated[list[float] | str, Field(description="Of length 1, if it is float; a string with `base64`.")]
    is_truncated: Annotated[bool, Field(description="Whether its text was cut; only if the request asks.")] = False
    token_count: Annotated[
        int,
        Field(
            description="Tokens of its text as the network saw it, instruction and special tokens included, after "
            "truncation; only if the request asks."
        ),
    ] = 0


class Usage(BaseModel):
    """Tokens of all texts as the network saw them, instruction and special tokens included, after truncation."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """Vectors in input order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Model(BaseModel):
    """A name that `model` may have."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Annotated[str, Field(description="Who offers the model; whose it is, the server does not know.")]
    root: Annotated[str, Field(description="The model on the server that the name stands for, as vLLM names it.")]
    dimension: Annotated[
        int | None, Field(description="Numbers of a vector; absent while the server does not say.")
    ] = None
    max_model_len: Annotated[
        int | None,
        Field(description="Tokens of the longest text that is not cut, as vLLM names it; absent like the other."),
    ] = None
    query_prompt: Annotated[
        str | None,
        Field(description="Stands before a query whose request names no instruction; absent like the others."),
    ] = None


class ModelList(BaseModel):
    """All names that `model` may have."""

    object: Literal["list"]
    data: list[Model]


class ErrorDetail(BaseModel):
    """What was expected, what came, what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail
