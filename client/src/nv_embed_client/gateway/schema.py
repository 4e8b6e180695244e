"""What goes over the wire, as the OpenAI API has it, with the few additions an embedding model needs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

_INPUT_EXAMPLES = ["The food was delicious.", ["first text", "second text"]]


class EmbeddingsRequest(BaseModel):
    """Texts to embed."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: Annotated[
        str | Annotated[list[str], Field(min_length=1)],
        Field(description="One text or a list of texts.", examples=_INPUT_EXAMPLES),
    ]
    model: Annotated[
        str,
        Field(
            description="The model, or the model with `-query` or `-passage` after its name, which stands for "
            "`input_type` in clients that cannot send it."
        ),
    ]
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        Field(description="`base64`: the vector's float32 values in little-endian order; null is `float`."),
    ] = "float"
    input_type: Annotated[
        Literal["query", "passage"] | None,
        Field(
            description="A query has the model's instruction put before it; a passage has none. `passage` when "
            "absent. It must not contradict a suffix of `model`."
        ),
    ] = None
    truncate: Annotated[
        Literal["END", "NONE"],
        Field(description="What to do with a text that is too long for the model: cut it, or refuse the request."),
    ] = "END"
    dimensions: Annotated[
        None,
        Field(description="Always refused: NV-Embed-v2 was not trained so that a part of its vectors means anything."),
    ] = None
    user: Annotated[str | None, Field(description="Accepted and ignored.")] = None

    @field_validator("input", mode="before")
    @classmethod
    def _texts(cls, value: object) -> object:
        # Checked here, as the two forms of a union would each complain in their own words.
        if isinstance(value, list) and value and isinstance(value[0], int | list):
            raise PydanticCustomError(
                "tokens",
                "expected texts; got token ids, which belong to another model's tokenizer; send the texts themselves "
                "(in LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False)",
            )
        if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(t, str) for t in value)):
            return value
        got = "an empty list" if value == [] else "a list of something else" if isinstance(value, list) else "neither"
        raise PydanticCustomError(
            "texts", "expected one text or a list of at least one; got {got}; correct it", {"got": got}
        )

    @field_validator("dimensions", mode="before")
    @classmethod
    def _no_dimensions(cls, value: object) -> object:
        if value is not None:
            raise PydanticCustomError(
                "dimensions",
                "expected no dimensions, as NV-Embed-v2 was not trained so that a part of its vectors means anything; "
                "got some; leave it out",
            )
        return value


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"]
    index: Annotated[int, Field(description="Of the text within `input`.")]
    embedding: Annotated[list[float] | str, Field(description="Of length 1; a string with `base64`.")]


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
    owned_by: str


class ModelList(BaseModel):
    """All names that `model` may have."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """A gateway that is well."""

    status: Literal["live", "ready"]


class ErrorDetail(BaseModel):
    """What was expected, what came, what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail
