"""What the OpenAPI page says beyond what FastAPI finds out by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from nv_embed_client import __version__
from nv_embed_client.gateway import paths
from nv_embed_client.gateway.names import PROMPTS, Meaning, Named
from nv_embed_client.gateway.refusals import RETRY_AFTER_SECONDS
from nv_embed_client.gateway.schema import ErrorResponse
from nv_embed_client.gateway.settings import GatewaySettings
from nv_embed_client.model_info import ModelInfo

VERSION = __version__
_MEANINGS = {
    400: "The request is not what this page says, or the model refuses its texts",
    401: "The API key is missing or wrong",
    404: "No such model",
    413: "The body is too large, or has too many texts",
    415: "The body is compressed",
    422: "The request is not what this page says, or the model refuses its texts",
    424: "The server behind this gateway failed, or gave no answer in time",
    429: "The server behind this gateway is full, stopping or absent; try again",
    502: "The server behind this gateway failed",
    503: "The server behind this gateway is full, stopping or absent; try again",
    504: "No answer in time",
}


class TEIErrorResponse(BaseModel):
    """Every answer that is no success, in TEI's shape."""

    error: str
    error_type: str


def responses(*statuses: int, model: type[BaseModel] = ErrorResponse) -> dict[int | str, dict[str, Any]]:
    """The error answers of an operation."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        described[status] = {"model": model, "description": _MEANINGS[status]}
        if status in (429, 503):
            described[status]["headers"] = {
                "Retry-After": {
                    "description": "Seconds to wait",
                    "schema": {"type": "integer", "const": RETRY_AFTER_SECONDS},
                }
            }
    return described


def tei_responses() -> dict[int | str, dict[str, Any]]:
    """The error answers of TEI's operations."""
    return responses(401, 413, 415, 422, 424, 429, model=TEIErrorResponse)


def page(
    app: FastAPI, settings: GatewaySettings, names: Mapping[str, Named], infos: Mapping[str, ModelInfo | None]
) -> dict[str, Any]:
    """The page, with what depends on the settings and the models, and without what never happens.

    Args:
        infos: what the server says of each model; None if it does not say.
    """
    dimensions = {model: info.dimension for model, info in infos.items() if info is not None}
    page = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for path, operations in page["paths"].items():
        for method, operation in operations.items():
            answers = operation["responses"]
            if path not in paths.TEI:
                answers.pop("422", None)  # FastAPI's own; such requests are answered 400, as OpenAI does
            if settings.api_key is None:
                answers.pop("401", None)
            elif not paths.is_open(method.upper(), path):
                operation["security"] = [{"key": []}]
    if settings.api_key is not None:
        page["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    schemas = page["components"]["schemas"]
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    [looked_up] = page["paths"]["/v1/models/{model}"]["get"]["parameters"]
    looked_up["schema"]["enum"] = list(names)
    own_dimension = dimensions.get(settings.default_model)
    for request, input_field, accepted in (
        ("EmbeddingsRequest", "input", sorted({*dimensions.values()}) if len(dimensions) == len(infos) else []),
        ("EmbedRequest", "inputs", [] if own_dimension is None else [own_dimension]),
    ):
        schemas[request]["additionalProperties"] = settings.ignore_unknown_fields
        fields = schemas[request]["properties"]
        for alternative in fields[input_field]["anyOf"]:
            if alternative["type"] == "array":
                alternative["maxItems"] = settings.max_inputs
        _string_of(fields["prompt_name"])["enum"] = list(PROMPTS)
        if accepted:
            fields["dimensions"]["anyOf"] = [{"type": "integer", "enum": accepted}, {"type": "null"}]
    fields = schemas["EmbeddingsRequest"]["properties"]
    _string_of(fields["model"])["enum"] = list(names)
    # FastAPI leaves a pattern beside the alternatives, where it would hold null to it, too.
    _string_of(fields["instruction"])["pattern"] = fields["instruction"].pop("pattern")
    schemas["EmbeddingsRequest"]["not"] = {
        "description": "Two fields that contradict each other: an instruction makes texts queries, a name of `model` "
        "may, and there is one instruction. A model has one number of dimensions.",
        "anyOf": [
            *_contradictions({name: named.meaning for name, named in names.items()}),
            *_other_dimensions(settings.default_model, names, dimensions),
        ],
    }
    return page


def _other_dimensions(
    default: str, names: Mapping[str, Named], dimensions: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    """Names of each model beside the dimensions of others."""
    for model, own in dimensions.items():
        others = sorted({*dimensions.values()} - {own})
        if not others:
            continue
        wrong = {"dimensions": {"enum": others}}
        yield {
            "properties": {"model": {"enum": [name for name, named in names.items() if named.model == model]}, **wrong},
            "required": ["model", "dimensions"],
        }
        if model == default:
            yield {"properties": {"model": {"type": "null"}, **wrong}, "required": ["dimensions"]}


def _string_of(field: dict[str, Any]) -> dict[str, Any]:
    """The alternative of an optional field that is not null."""
    found: dict[str, Any] = next(each for each in field["anyOf"] if each["type"] == "string")
    return found


def _contradictions(names: Mapping[str, Meaning]) -> list[dict[str, Any]]:
    def saying(meanings: Mapping[str, Meaning]) -> dict[str, dict[str, Any]]:
        return {
            "query": {"enum": [name for name, meaning in meanings.items() if meaning.input_type == "query"]},
            "passage": {"enum": [name for name, meaning in meanings.items() if meaning.input_type == "passage"]},
            "instruction": {"enum": [name for name, meaning in meanings.items() if meaning.instruction is not None]},
        }

    any_text = {"type": "string"}
    none: dict[str, Any] = {"enum": []}
    says = {
        "model": saying(names),
        "input_type": {"query": {"const": "query"}, "passage": {"const": "passage"}, "instruction": none},
        "prompt_name": saying(PROMPTS),
        "instruction": {"query": any_text, "passage": none, "instruction": any_text},
    }
    pairs = [{"prompt_name": any_text, "instruction": any_text}]
    for one, other in permutations(says, 2):
        pairs.append({one: says[one]["query"], other: says[other]["passage"]})
        if one < other:
            pairs.append({one: says[one]["instruction"], other: says[other]["instruction"]})
    return [{"properties": pair, "required": list(pair)} for pair in pairs if none not in pair.values()]
