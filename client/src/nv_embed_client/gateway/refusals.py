"""Everything the gateway refuses or fails at, in the OpenAI API's error shape."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from nv_embed_client.errors import (
    DeadlineExceeded,
    InvalidInput,
    NVEmbedError,
    PartialFailure,
    Unavailable,
)

RETRY_AFTER_SECONDS = 1
_NO_RETRY = {"x-should-retry": "false"}  # else OpenAI's clients ask for the same work twice more
logger = logging.getLogger("uvicorn.error")  # where the gateway's other lines go


def refusal(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """One error answer."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})
    return Response(content, status, dict(headers or {}), media_type="application/json")


def unavailable(message: str) -> Response:
    """503, with when to come back."""
    return refusal(503, message, code="unavailable", headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def of_client_error(error: NVEmbedError) -> Response:
    """What the client of Triton raised. Details of this deployment stay out of the answer."""
    if isinstance(error, PartialFailure):
        error = error.failures[0].error
    match error:
        case InvalidInput():
            return refusal(400, str(error), param="input", code="invalid_input")
        case Unavailable():
            logger.warning("the server behind this gateway is unavailable: %s", error)
            return unavailable("expected a server with room; got none that answers; try again later")
        case DeadlineExceeded():
            message = "expected vectors in time; got none; send fewer or shorter texts"
            return refusal(504, message, code="timeout", headers=_NO_RETRY)
        case _:
            logger.error("the server behind this gateway failed: %s: %s", type(error).__name__, error)
            return refusal(
                502,
                "expected vectors; the server behind this gateway failed; its operator's log says why",
                code="server",
                headers=_NO_RETRY,
            )


async def of_validation_error(request: Request, error: Exception) -> Response:
    """A body that is not what the schema says."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    # ("body", "input", "list[str]", 3): the field a caller knows comes second.
    param = str(first["loc"][1]) if len(first["loc"]) > 1 and isinstance(first["loc"][1], str) else None
    if first["type"] == "json_invalid":
        return refusal(400, "expected a body in JSON; got something else; correct it", code="invalid_json")
    if first["loc"] == ("body",) and "json" not in request.headers.get("content-type", ""):
        return refusal(
            400,
            "expected JSON and the header 'Content-Type: application/json'; got another type or none; set it",
            code="content_type",
        )
    message = str(first["msg"])
    if not message.startswith("expected"):
        message = f"expected a body as /openapi.json describes it; got {param or 'a body'}: {message}; correct it"
    return refusal(400, message, param=param, code=str(first["type"]))


async def of_http_exception(request: Request, error: Exception) -> Response:
    """What the framework refuses: unknown paths, methods, bodies that are too large."""
    assert isinstance(error, HTTPException)
    message = {
        400: "expected a body in JSON; got something else; correct it",
        404: f"expected a path of this API; got {ascii(request.url.path)[:80]}; see /docs",
        405: f"expected another method here; got {request.method}; see /docs",
    }.get(error.status_code, str(error.detail))
    return refusal(error.status_code, message, headers=error.headers)


async def of_defect(request: Request, error: Exception) -> Response:
    """A defect of the gateway; uvicorn logs it."""
    return refusal(500, "expected an answer; the gateway failed; its operator's log says why", code="internal")
