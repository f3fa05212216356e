"""Errors in OpenAI's shape, or in that of the API whose path was asked, and the headers that tell
clients whether to try again.

The status of an error comes from ``pdserve.errors.STATUS``. A shed request says when to come back.
An expired deadline and a request that kills workers say "do not": OpenAI's clients would send it
twice more, just when the cluster is slowest, or for two more workers to die of.
"""

import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from pdserve.cluster.http.messages.errors import (
    message_bug,
    message_error,
    message_status,
    speaks_messages,
)
from pdserve.cluster.logs import request_id
from pdserve.errors import (
    NOT_AGAIN,
    RETRY_AFTER_MS_MAX,
    PdserveError,
    PoisonRequest,
    Unauthorized,
    status_of,
)

MS_PER_S = 1000


def error_body(error: PdserveError | HTTPException) -> dict[str, Any]:
    if isinstance(error, HTTPException):
        return _body(error.detail, "invalid_request_error", None, f"http_{error.status_code}")
    body = _body(str(error), status_of(error).openai_type, error.field, error.kind)
    if isinstance(error, PoisonRequest):
        body["error"]["request_id"] = error.request
    return body


def error_status(error: PdserveError | HTTPException, path: str = "") -> int:
    """As who asks at ``path`` is told."""
    if speaks_messages(path):
        return message_status(error)
    return error.status_code if isinstance(error, HTTPException) else status_of(error).http


def error_response(error: PdserveError | HTTPException, path: str = "") -> Response:
    """``path``: that was asked for; each API has a shape of its own."""
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        headers.update(error.headers or {})
    elif error.retry_after_ms is not None:
        retry_after_ms = min(max(1, error.retry_after_ms), RETRY_AFTER_MS_MAX)
        headers["retry-after-ms"] = str(retry_after_ms)
        headers["retry-after"] = str(-(-retry_after_ms // MS_PER_S))  # ceil
    elif isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    elif isinstance(error, NOT_AGAIN):
        headers["x-should-retry"] = "false"
    is_message = speaks_messages(path)
    body = message_error(error, request_id.get()) if is_message else error_body(error)
    return Response(json.dumps(body), error_status(error, path), headers, "application/json")


def internal_error(path: str = "") -> Response:
    """For a bug of ours: what went wrong is in the log, not in the answer."""
    said = "an error inside the server; its log has the details"
    if speaks_messages(path):
        body = message_bug(said, request_id.get())
    else:
        body = _body(said, "server_error", None, None)
    return Response(json.dumps(body), 500, media_type="application/json")


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
