"""Errors as OpenAI's API gives them."""

from __future__ import annotations

import logging
import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from looptx_core.errors import DataError, MissingError, UsageError
from looptx_core.serving.worker import EngineError

log = logging.getLogger(__name__)
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients would ask again, and wait again


class ApiError(HTTPException):
    """An answer that is an error. param: the field that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def document(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status_code)
        kind = kind or ("invalid_request_error" if self.status_code < 500 else "server_error")
        error = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.document(), self.status_code, self.headers)


def bad_field(name: str, message: str) -> ApiError:
    return ApiError(400, message, name)


def too_long(context: int, why: str, name: str | None = None) -> ApiError:
    """Of a prompt, or what is to follow it, that the context has no room for.

    Clients such as litellm tell this error by OpenAI's wording.
    """
    message = f"this model's maximum context length is {context} tokens here, and {why}"
    return ApiError(400, message, name, "context_length_exceeded")


def full_queue(most: int) -> ApiError:
    message = f"{most} requests are waiting already; try again in a moment"
    return ApiError(429, message, code="queue_full", headers={"retry-after": "1"})


def ending() -> ApiError:
    message = "the server is ending; try another one, or later"
    return ApiError(503, message, code="server_ending", headers={"retry-after": "5"})


def too_late(seconds: float) -> ApiError:
    message = f"the request took more than {seconds:g} seconds; ask for less"
    return ApiError(408, message, code="request_timeout", headers=_NO_RETRY)


def of(error: Exception) -> ApiError:
    """What a client is told of an error of the engine's: bad input with its reason, else little,
    and the log has the rest."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError | DataError | MissingError):
        named = re.search(r"`(\w+)`", str(error))
        message = re.sub(r"`(\w+)`", r"\1", str(error))
        return ApiError(400, message, named[1] if named else None)
    if not isinstance(error, EngineError):
        log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request; its log says why", headers=_NO_RETRY)
