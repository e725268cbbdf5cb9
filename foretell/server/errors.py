"""Errors as HTTP clients know them: OpenAI's shape, or Anthropic's under /v1/messages."""

from __future__ import annotations

from typing import Any

from foretell.errors import DeadlineError, ForetellError, InvalidRequestError, OverloadedError, UnavailableError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_ANTHROPIC_TYPES = {**_TYPES, 413: "request_too_large", 500: "api_error", 503: "overloaded_error"}
NO_THREADS = "thread_unsupported_request"  # the code that tells Anthropic's client to go on without a thread
INTERNAL_MESSAGE = "the server failed on this request; its log says why under this request id"


class ApiError(Exception):
    """An answer other than 200. ``param`` names the field at fault; ``code`` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}


class ClientGoneError(Exception):
    """Nobody is there any more to be answered."""


def as_api_error(error: BaseException) -> ApiError | None:
    """What a client is told of ``error``; None for a defect of ours, whose text is nobody's business."""
    if isinstance(error, ApiError):
        return error
    message = " ".join(str(error).split())  # one line, whatever was quoted in it
    if isinstance(error, InvalidRequestError):
        return ApiError(400, message)
    if isinstance(error, OverloadedError):
        seconds = str(max(1, round(error.retry_after_seconds)))
        return ApiError(429, message, code="overloaded", headers={"retry-after": seconds})
    if isinstance(error, UnavailableError):
        return ApiError(503, message, code="engine_unavailable", headers={"retry-after": "1"})
    if isinstance(error, DeadlineError):
        # OpenAI's and Anthropic's clients would else send a 408 again, twice: as much work, for the same end
        return ApiError(408, message, code="deadline_exceeded", headers={"x-should-retry": "false"})
    if isinstance(error, ForetellError):
        return ApiError(500, message, code="engine_error")
    return None


def told(error: BaseException) -> ApiError:
    """As ``as_api_error``, with a plain 500 for our own defects."""
    return as_api_error(error) or ApiError(500, INTERNAL_MESSAGE, code="internal_error")


def error_body(error: ApiError, path: str = "", request_id: str | None = None) -> dict[str, Any]:
    """The JSON object for ``error``; ``path`` decides whose shape it has."""
    if path.startswith("/v1/messages"):
        shown = {"type": _ANTHROPIC_TYPES.get(error.status, "api_error"), "message": error.message}
        details = {"details": {"error_code": NO_THREADS}} if error.code == NO_THREADS else {}
        return {"type": "error", "error": {**shown, **details}, "request_id": request_id}
    kind = _TYPES.get(error.status, "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
