"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from openlance.errors import InputError
from openlance.serve.jobs import Busy, JobError, Why

log = logging.getLogger("openlance.serve")

STATUS_OF = {
    Why.REFUSED: 400,
    Why.CANCELLED: 499,
    Why.TIMED_OUT: 504,
    Why.STOPPED: 503,
    Why.FAILED: 500,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {429: "server_busy", 499: "cancelled", 503: "server_stopping", 504: "timed_out"}
_PLAIN = {
    404: "nothing is at this address: see /docs for what there is",
    405: "this address does not take that method: see /docs",
}


class ErrorDetail(BaseModel):
    """What went wrong. param: the field to mend. code: one word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not what was asked for."""

    error: ErrorDetail


RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "model": ErrorBody,
        "description": "400: the request cannot be used, `param` names the field; 401: no API key, or an "
        "unknown one; 404: unknown; 413: too large; 429: the queue is full, try again after Retry-After "
        "seconds; 500: the server's fault; 503: loading, or shutting down; 504: took too long.",
    }
}
"""For `APIRouter(responses=…)`: what its routes may answer beside what they promise."""


class ApiError(HTTPException):
    """An answer with this status, in OpenAI's shape. param: the field that is at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """What stands in the body. Text from clients may hold half of a surrogate pair, which JSON cannot."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    detail = {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}
    return {"error": {name: _encodable(value) for name, value in detail.items()}}


def error_response(error: ApiError) -> JSONResponse:
    body = error_body(error.status_code, error.detail, param=error.param, code=error.code)
    return JSONResponse(body, error.status_code, error.headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client hears of an error that the engine or a check of the request raised."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, JobError):
        return ApiError(STATUS_OF[error.why], str(error))
    if isinstance(error, Busy):
        return ApiError(429, str(error), headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    assert isinstance(error, HTTPException), error
    message = _PLAIN.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers)


def add_handlers(app: FastAPI) -> None:
    """Have every error answered in this shape."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        return error_response(as_api_error(error))

    for kind in (HTTPException, InputError, Busy, JobError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _unforeseen)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    param, message = explain(error.errors())
    return error_response(ApiError(400, message, param=param))


async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
    """A defect: the client gets the number under which the log has the traceback."""
    number = getattr(request.state, "request_id", "")
    response = error_response(ApiError(500, f"the server failed on this request; its log has it as {number}"))
    response.headers["X-Request-Id"] = number  # this answer is made outside of what sets it on others
    return response


def explain(errors: Sequence[Mapping[str, Any]]) -> tuple[str | None, str]:
    """(field, message) of what pydantic found: the first mistake, and how many more there are."""
    first = errors[0]
    names = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(names)[:200] or None
    if first["type"] == "json_invalid":
        return None, f"the body is not JSON: {first['ctx']['error']}"
    if first["type"] == "extra_forbidden":
        message = f"unknown field {param}: leave it out"
    elif param is None:
        message = "send a JSON object, with Content-Type: application/json"
    else:
        said = str(first["msg"])
        message = f"{param}: {said[:1].lower()}{said[1:]}"
    more = len(errors) - 1
    return param, message + (f" (and {more} more)" if more else "")


def _encodable(value: str | None) -> str | None:
    return None if value is None else value.encode(errors="replace").decode()
