"""The operations of Hugging Face's text-embeddings-inference (TEI), in its shapes: /embed and /info.

Shapes: https://huggingface.github.io/text-embeddings-inference/
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator

from nv_embed_client.gateway.embedder import Embedder
from nv_embed_client.gateway.names import PROMPTS, Meaning, Named
from nv_embed_client.gateway.openapi import VERSION, tei_responses
from nv_embed_client.gateway.refusals import check_fields
from nv_embed_client.gateway.reply import Replies
from nv_embed_client.gateway.schema import (
    Dimensions,
    PromptName,
    Texts,
    checked_prompt_name,
    checked_texts,
    refused,
)
from nv_embed_client.gateway.settings import GatewaySettings

# The gateway sets no limit; TEI's own default, because clients size their pools by it.
_MAX_CONCURRENT_REQUESTS = 512


class EmbedRequest(BaseModel):
    """Texts to embed. Without `prompt_name` they are passages."""

    # What is unknown is refused by the operation, unless the operator has it ignored.
    model_config = ConfigDict(extra="allow", strict=True)

    inputs: Texts
    truncate: Annotated[
        bool | None,
        Field(description="Cut the end of a text that is too long; false refuses the request; null is true."),
    ] = None
    truncation_direction: Annotated[
        Literal["right", "Right"] | None, Field(description="Where a text that is too long is cut.")
    ] = "right"
    prompt_name: PromptName = None
    normalize: Annotated[Literal[True] | None, Field(description="Vectors always have length 1.")] = True
    dimensions: Dimensions = None

    _texts = field_validator("inputs", mode="before")(checked_texts)
    _prompt_name = field_validator("prompt_name")(checked_prompt_name)

    @field_validator("truncation_direction", mode="before")
    @classmethod
    def _right_only(cls, value: object) -> object:
        if value in ("left", "Left"):
            raise refused(
                "truncation_direction",
                expected="'right' as truncation_direction",
                got="'left', which this model's server cannot do",
                remedy="send 'right', or cut the start of long texts yourself",
            )
        return value

    @field_validator("normalize", mode="before")
    @classmethod
    def _always(cls, value: object) -> object:
        if value is False:
            raise refused(
                "normalize",
                expected="normalize true, because the server's vectors have length 1",
                got="false",
                remedy="leave it out",
            )
        return value


class EmbeddingModel(BaseModel):
    """How vectors are made of a text's tokens."""

    pooling: str


class ModelType(BaseModel):
    """What the model is for."""

    embedding: EmbeddingModel


class Info(BaseModel):
    """The model and its limits."""

    model_id: str
    model_sha: Annotated[str | None, Field(description="The fingerprint of the checkpoint's files.")]
    model_dtype: Annotated[str, Field(description="In which the model computes; vectors are float32.")]
    model_type: ModelType
    max_concurrent_requests: Annotated[int, Field(description="A recommendation; nothing is refused beyond it.")]
    max_input_length: Annotated[int, Field(description="Tokens of the longest text that is not cut.")]
    max_batch_tokens: Annotated[int, Field(description="Tokens of one request.")]
    max_batch_requests: int | None
    max_client_batch_size: Annotated[int, Field(description="Texts of one request.")]
    auto_truncate: Annotated[bool, Field(description="Whether long texts are cut if the request says nothing.")]
    tokenization_workers: int
    version: Annotated[str, Field(description="Of the gateway.")]
    sha: str | None
    docker_label: str | None


def operations(settings: GatewaySettings, embedder: Embedder, replies: Replies) -> APIRouter:
    """The routes of one gateway."""
    router = APIRouter()

    @router.post("/", summary="Embed texts, as at /embed", response_model=list[list[float]], responses=tei_responses())
    @router.post(
        "/embed", summary="Embed texts in TEI's shape", response_model=list[list[float]], responses=tei_responses()
    )
    async def embed(body: EmbedRequest, request: Request) -> Response:
        """Embeds one text or many; vectors have length 1 and come in input order."""
        check_fields(body, ignore_unknown=settings.ignore_unknown_fields)
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        named = Named(settings.default_model, Meaning() if body.prompt_name is None else PROMPTS[body.prompt_name])
        truncate: Literal["END", "NONE"] = "NONE" if body.truncate is False else "END"
        result, _ = await embedder.embed(request, texts, named, truncate, body.dimensions)
        return replies.response(result, lambda _, vector: vector, b"[", b"]")

    @router.get("/info", summary="The model in TEI's shape", response_model=Info, responses=tei_responses())
    async def info() -> dict[str, Any]:
        """The model's name and limits."""
        told = await embedder.model_info(settings.default_model)
        return {
            "model_id": told.name,
            "model_sha": told.fingerprint,
            "model_dtype": told.dtype,
            "model_type": {"embedding": {"pooling": told.pooling}},
            "max_concurrent_requests": _MAX_CONCURRENT_REQUESTS,
            "max_input_length": told.max_sequence_tokens,
            "max_batch_tokens": told.max_sequence_tokens * settings.max_inputs,
            "max_batch_requests": None,
            "max_client_batch_size": settings.max_inputs,
            "auto_truncate": True,
            "tokenization_workers": 1,
            "version": VERSION,
            "sha": None,
            "docker_label": None,
        }

    return router
