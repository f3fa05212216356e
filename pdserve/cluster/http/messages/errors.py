"""Errors in Anthropic's shape. Pure.

    {"type": "error", "error": {"type", "message", "details"}, "request_id"}

``details.error_code`` is our word for the cause, where Anthropic's libraries look for one, and
``details.field`` the path to the field at fault. The statuses are that API's: it has no 503. What
is over a bound of ours is 529, a worker or a store that is gone is 500; clients try both again.

Source: https://platform.claude.com/docs/en/api/errors
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from starlette.exceptions import HTTPException

from pdserve.errors import CapacityError, GatewayLeaving, PdserveError, PoisonRequest, status_of

PATH = "/v1/messages"

OVERLOADED = 529

_TYPES: Mapping[int, str] = MappingProxyType(
    {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        504: "timeout_error",
        OVERLOADED: "overloaded_error",
    }
)


def speaks_messages(path: str) -> bool:
    """Whether who asks there reads this API's errors."""
    return path == PATH or path.startswith(f"{PATH}/")


def message_status(error: PdserveError | HTTPException) -> int:
    if isinstance(error, HTTPException):
        return error.status_code
    status = status_of(error).http
    if status != 503:
        return status
    return OVERLOADED if isinstance(error, CapacityError | GatewayLeaving) else 500


def message_error(error: PdserveError | HTTPException, request_id: str) -> dict[str, Any]:
    """
    Args:
        request_id: as in the header; empty where the request has none yet.
    """
    if isinstance(error, HTTPException):
        return _body(error, error.detail, f"http_{error.status_code}", None, request_id)
    body = _body(error, str(error), error.kind, error.field, request_id)
    if isinstance(error, PoisonRequest):
        body["error"]["details"]["request"] = error.request
    return body


def message_bug(message: str, request_id: str) -> dict[str, Any]:
    return {
        "type": "error",
        "error": {"type": "api_error", "message": message, "details": None},
        "request_id": request_id or None,
    }


def _body(
    error: PdserveError | HTTPException, message: str, code: str, field: str | None, request_id: str
) -> dict[str, Any]:
    status = message_status(error)
    # "This error type may also be used for other 4XX status codes not listed."
    other = "api_error" if status >= 500 else "invalid_request_error"
    return {
        "type": "error",
        "error": {
            "type": _TYPES.get(status, other),
            "message": message,
            "details": {"error_code": code, "field": field},
        },
        "request_id": request_id or None,
    }
