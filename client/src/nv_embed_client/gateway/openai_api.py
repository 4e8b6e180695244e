"""The OpenAI API's operations: /v1/embeddings and /v1/models."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from nv_embed_client.gateway.embedder import Embedder
from nv_embed_client.gateway.names import Named, decided
from nv_embed_client.gateway.openapi import responses
from nv_embed_client.gateway.refusals import Refusal, check_fields
from nv_embed_client.gateway.reply import Replies, as_base64
from nv_embed_client.gateway.schema import EmbeddingsRequest, EmbeddingsResponse, Model, ModelList
from nv_embed_client.gateway.settings import GatewaySettings
from nv_embed_client.model_info import ModelInfo


def operations(settings: GatewaySettings, names: dict[str, Named], embedder: Embedder, replies: Replies) -> APIRouter:
    """The routes of one gateway."""
    router = APIRouter()

    def described(name: str, info: ModelInfo | None) -> dict[str, Any]:
        told = {
            "id": name, "object": "model", "created": 0, "owned_by": "nv-embed-gateway", "root": names[name].model,
        }  # fmt: skip
        if info is not None:
            told |= {
                "dimension": info.dimension,
                "max_model_len": info.max_sequence_tokens,
                "query_prompt": info.query_prompt,
            }
        return told

    def known(name: str) -> str:
        if name not in names:
            raise Refusal(
                404,
                f"expected one of the models {', '.join(names)}; got {ascii(name)[:80]}; see /v1/models, or have the "
                "gateway's operator add it with --alias",
                param="model",
                code="model_not_found",
            )
        return name

    @router.post(
        "/v1/embeddings",
        summary="Embed texts",
        response_model=EmbeddingsResponse,
        responses=responses(400, 401, 404, 413, 415, 502, 503, 504),
    )
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        """Embeds one text or many; vectors have length 1 and come in input order."""
        check_fields(body, ignore_unknown=settings.ignore_unknown_fields)
        name = known(settings.default_model if body.model is None else body.model)
        meaning = decided((name, names[name].meaning), body.input_type, body.instruction, body.prompt_name)
        named = Named(names[name].model, meaning)
        texts = [body.input] if isinstance(body.input, str) else body.input
        result, num_tokens = await embedder.embed(
            request, texts, named, body.truncate or "END", body.dimensions,
            embedding_type=body.embedding_type or "float", is_truncated=body.is_truncated or False,
        )  # fmt: skip
        in_base64 = body.encoding_format == "base64"

        def item(index: int, vector: Any) -> dict[str, Any]:
            embedding = as_base64(vector) if in_base64 else vector
            told = {"object": "embedding", "index": index, "embedding": embedding}
            if body.is_truncated and result.is_truncated is not None:
                told["is_truncated"] = bool(result.is_truncated[index])
            if body.token_count and result.token_counts is not None:
                told["token_count"] = int(result.token_counts[index])
            return told

        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        tail = b"]," + orjson.dumps({"model": name, "usage": usage})[1:]
        return replies.response(result, item, b'{"object":"list","data":[', tail)

    @router.get(
        "/v1/models",
        summary="List the models",
        response_model=ModelList,
        response_model_exclude_unset=True,
        responses=responses(401),
    )
    async def list_models() -> dict[str, Any]:
        """The names that `model` may have."""
        infos = await embedder.known_infos()
        return {"object": "list", "data": [described(name, infos[named.model]) for name, named in names.items()]}

    @router.get(
        "/v1/models/{model:path}",
        summary="Look up a model",
        response_model=Model,
        response_model_exclude_unset=True,
        responses=responses(401, 404),
    )
    async def retrieve_model(model: str) -> Any:
        """One of the names that `model` may have."""
        return described(known(model), await embedder.known_info(names[model].model))

    return router
