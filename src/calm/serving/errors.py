"""Errors in OpenAI's format, so that its clients raise what they would raise there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)


class ErrorDetail(BaseModel):
    """What went wrong, and with which parameter."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not one."""

    error: ErrorDetail


class APIError(Exception):
    """A request that is not answered.

    Args:
        status: HTTP status.
        message: The value, what was expected and what to do.
        code: For programs.
        param: The parameter at fault.
        retry_after: Seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        # a parameter's name may hold what no UTF-8 can say
        message = str(self).encode(errors="replace").decode()
        param = self.param and self.param.encode(errors="replace").decode()
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer over HTTP."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status == 504:  # OpenAI's clients would ask for the same long answer twice more
            headers["x-should-retry"] = "false"
        return JSONResponse(self.body(), self.status, headers)


def from_validation(error: RequestValidationError) -> APIError:
    """A 400 that names the first parameter at fault; what was sent is not repeated."""
    problems = error.errors()
    if problems[0]["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {problems[0]['ctx']['error']}")
    param = _place(problems[0]["loc"], error.body)
    if problems[0]["type"] == "extra_forbidden":
        message = "this server does not know or support this parameter: leave it out"
    else:  # a parameter of several types has a complaint from each
        here = [problem for problem in problems if problem["loc"][:2] == problems[0]["loc"][:2]]
        message = ", or: ".join(dict.fromkeys(str(problem["msg"]) for problem in here))
    return APIError(400, f"{param or 'the body'}: {message}", param=param or None)


def _place(location: Sequence[str | int], body: Any) -> str:
    """Where in the body, without pydantic's names for the types that it tried there."""
    names: list[str] = []
    for part in location[1:]:
        if isinstance(body, dict) and (part in body or not names):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
        else:
            continue
        names.append(str(part))
    return ".".join(names)


def install(app: FastAPI) -> None:
    """Have every error answered in this format."""

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        response = APIError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return APIError(500, "the server failed; its log says why").response()
