"""Everything that the gateway refuses or fails at."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from nv_embed_client.errors import (
    DeadlineExceeded,
    InvalidInput,
    ModelNotFound,
    NVEmbedError,
    PartialFailure,
    ServerTooOld,
    Unavailable,
)
from nv_embed_client.gateway import paths

RETRY_AFTER_SECONDS = 1
TOO_MANY = "too_many_inputs"
_NO_RETRY = {"x-should-retry": "false"}  # else OpenAI's clients ask for the same work twice more
# TEI's status and kind of error by ours. All others are the caller's, whose status is kept.
_TEI_ERRORS = {
    400: (422, "Validation"),
    404: (424, "Backend"),
    503: (429, "Overloaded"),
    500: (424, "Backend"),
    502: (424, "Backend"),
    504: (424, "Backend"),
}
logger = logging.getLogger("uvicorn.error")  # where the gateway's other lines go


class Refusal(HTTPException):
    """An answer that is no success. FastAPI lets an `HTTPException` through wherever it is raised.

    Args:
        status: of HTTP.
        message: what was expected, what came, what to do.
        param: the field that is to blame, as OpenAI's errors have it.
        code: a word for programs.
        headers: beside those of every answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self._param = param
        self._code = code

    def answer(self, path: str) -> Response:
        """In the shape that clients of this path know: TEI's, or the OpenAI API's."""
        if path in paths.TEI:
            status, kind = _TEI_ERRORS.get(self.status_code, (self.status_code, "Validation"))
            if self._code == TOO_MANY:
                status = 413
            content: object = {"error": self.detail, "error_type": kind}
        else:
            status = self.status_code
            kind = "invalid_request_error" if status < 500 else "server_error"
            content = {"error": {"message": self.detail, "type": kind, "param": self._param, "code": self._code}}
        return Response(orjson.dumps(content), status, dict(self.headers or {}), media_type="application/json")


def unavailable(message: str) -> Refusal:
    """503, with when to come back."""
    return Refusal(503, message, code="unavailable", headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def check_fields(body: BaseModel, *, ignore_unknown: bool) -> None:
    """Refuse the fields of a body that its schema does not know."""
    if body.model_extra and not ignore_unknown:
        unknown = next(iter(body.model_extra))
        raise Refusal(
            400,
            f"expected no fields but {', '.join(type(body).model_fields)}; got {ascii(unknown)[:80]}; leave it out, or "
            "have the gateway's operator start it with --ignore-unknown-fields",
            param=unknown,
            code="unknown_field",
        )


def of_client_error(error: NVEmbedError, model: str, texts: Sequence[str], timeout_seconds: float) -> Refusal:
    """What the client of Triton raised for `texts`, none if it asked about the model.

    Details of this deployment stay out of the answer. The log has them.
    """
    missing: Sequence[int] = range(len(texts))
    if isinstance(error, PartialFailure):
        missing = [*error.failed, *range(len(error.embeddings), len(texts))]
        error = error.failures[0].error
    match error:
        case InvalidInput():
            return Refusal(400, str(error), param="input", code="invalid_input")
        case Unavailable() | DeadlineExceeded() if "proxy" in str(error):
            # Whoever sets a gateway up meets this first, and waiting does not mend it. A proxy's password stays here.
            message = re.sub(r"//[^/@\s]*@", "//", str(error))
            logger.warning("the server behind this gateway is unavailable: %s", message)
            return unavailable(message)
        case Unavailable():
            logger.warning("the server behind this gateway is unavailable: %s", error)
            return unavailable("expected a server with room; got none that answers; try again later")
        case ModelNotFound():
            logger.error(
                "the server behind this gateway does not have model %s; load it there, or correct --model-name: %s",
                model, error,
            )  # fmt: skip
            return Refusal(
                404,
                f"expected a model that the server behind this gateway has; got {ascii(model)[:80]}, which it does "
                "not have; choose another of /v1/models, or have the server's operator load it",
                param="model",
                code="model_not_found",
            )
        case ServerTooOld():
            logger.error("the server behind this gateway is too old for a request: model %s: %s", model, error)
            return Refusal(
                400,
                "expected fields that the server behind this gateway knows; got 'embedding_type' or 'is_truncated', "
                "for which it is too old; leave them out, or have its operator update it",
                code="server_too_old",
            )
        case DeadlineExceeded() if not texts:
            return unavailable(
                f"expected to learn what model {ascii(model)[:80]} is within {timeout_seconds:g} "
                "seconds; got no answer; try again later"
            )
        case DeadlineExceeded():
            longest = max(missing, key=lambda index: len(texts[index]))
            return Refusal(
                504,
                f"expected vectors of {len(texts)} texts within {timeout_seconds:g} seconds; got none of "
                f"{len(missing)}, of which text {longest} is the longest with {len(texts[longest])} characters; "
                "send fewer or shorter texts in one request, or have the gateway's operator raise --request-timeout",
                param="input",
                code="timeout",
                headers=_NO_RETRY,
            )
        case _:
            logger.error("the server behind this gateway failed: model %s: %s: %s", model, type(error).__name__, error)
            return Refusal(
                502,
                "expected vectors; the server behind this gateway failed; its operator's log says why",
                code="server",
                headers=_NO_RETRY,
            )


def of_validation_error(error: RequestValidationError, content_type: str) -> Refusal:
    """A body that is not what the schema says."""
    first = error.errors()[0]
    # ("body", "input", "list[str]", 3): the field a caller knows comes second.
    param = str(first["loc"][1]) if len(first["loc"]) > 1 and isinstance(first["loc"][1], str) else None
    if first["type"] == "json_invalid":
        return Refusal(400, "expected a body in JSON; got something else; correct it", code="invalid_json")
    if first["loc"] == ("body",) and "json" not in content_type:
        return Refusal(
            400,
            "expected JSON and the header 'Content-Type: application/json'; got another type or none; set it",
            code="content_type",
        )
    message = str(first["msg"])
    if not message.startswith("expected"):
        message = f"expected a body as /openapi.json describes it; got {param or 'a body'}: {message}; correct it"
    return Refusal(400, message, param=param, code=str(first["type"]))


def of_http_exception(error: HTTPException, method: str, path: str) -> Refusal:
    """What the framework refuses: unknown paths and methods, bodies that it cannot read."""
    message = {
        400: "expected a body in JSON; got something else; correct it",
        404: f"expected a path of this API; got {ascii(path)[:80]}; see /docs, and let the base URL of OpenAI's "
        "clients end with /v1",
        405: f"expected another method here; got {method}; see /docs",
    }.get(error.status_code, str(error.detail))
    headers = dict(error.headers or {})
    if error.status_code == 405 and path == "/":
        headers["Allow"] = "GET, POST"  # two operations, of which the framework names one
    return Refusal(error.status_code, message, headers=headers)


async def handle(request: Request, error: Exception) -> Response:
    """The answer to whatever an operation raises on purpose."""
    path = request.url.path
    if isinstance(error, RequestValidationError):
        error = of_validation_error(error, request.headers.get("content-type", ""))
    elif isinstance(error, HTTPException) and not isinstance(error, Refusal):
        error = of_http_exception(error, request.method, path)
    assert isinstance(error, Refusal)
    return error.answer(path)
