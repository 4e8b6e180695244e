"""What the OpenAPI page says beyond what FastAPI finds out by itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from nv_embed_client.gateway.refusals import RETRY_AFTER_SECONDS
from nv_embed_client.gateway.schema import ErrorResponse
from nv_embed_client.gateway.settings import GatewaySettings

_MEANINGS = {
    400: "The request is not what this page says, or the model refuses its texts",
    401: "The API key is missing or wrong",
    404: "No such model",
    413: "The body is too large",
    502: "The server behind this gateway failed",
    503: "The server behind this gateway is full, stopping or absent; try again",
    504: "No answer in time",
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of an operation."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        described[status] = {"model": ErrorResponse, "description": _MEANINGS[status]}
        if status == 503:
            described[status]["headers"] = {
                "Retry-After": {
                    "description": "Seconds to wait",
                    "schema": {"type": "integer", "const": RETRY_AFTER_SECONDS},
                }
            }
    return described


def complete(app: FastAPI, settings: GatewaySettings, models: list[str]) -> None:
    """Add what depends on the settings, and take out what never happens."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)  # such requests are answered 400, as OpenAI does
                    if settings.api_key is None:
                        operation["responses"].pop("401", None)
            schemas = schema["components"]["schemas"]
            schemas.pop("HTTPValidationError", None)
            schemas.pop("ValidationError", None)
            fields = schemas["EmbeddingsRequest"]["properties"]
            [looked_up] = schema["paths"]["/v1/models/{model}"]["get"]["parameters"]
            for named in (fields["model"], looked_up["schema"]):
                named["enum"] = models
            for alternative in fields["input"]["anyOf"]:
                if alternative["type"] == "array":
                    alternative["maxItems"] = settings.max_inputs
            schemas["EmbeddingsRequest"]["not"] = {
                "description": "An `input_type` that contradicts the suffix of `model`.",
                "anyOf": [
                    {
                        "properties": {
                            "model": {"const": f"{settings.model_name}-{suffix}"},
                            "input_type": {"const": other},
                        },
                        "required": ["model", "input_type"],
                    }
                    for suffix, other in (("query", "passage"), ("passage", "query"))
                ],
            }
            if settings.api_key is not None:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path, operations in schema["paths"].items():
                    if path.startswith("/v1/"):
                        for operation in operations.values():
                            operation["security"] = [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it
