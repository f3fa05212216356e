"""What schemathesis is told beside its own checks; it loads this file in a process of its own.

Its ``positive_data_acceptance`` wants every request that the document allows to be accepted. A JSON
Schema cannot say everything, so we have that check with the four exceptions that are documented:
their codes.
"""

import json
from typing import Any

import schemathesis
from schemathesis import GenerationMode

BEYOND_A_SCHEMA = {
    "conflicting_fields",
    "unusable_value",
    "context_length_exceeded",
    "model_not_found",
    "unknown_request",
}


@schemathesis.check
def what_the_document_allows_is_accepted(ctx: Any, response: Any, case: Any) -> None:
    """A request that follows the document has an answer, or is refused for what no schema says."""
    meta = case.meta
    if meta is None or meta.generation.mode is not GenerationMode.POSITIVE:
        return
    if response.status_code < 400:
        return
    error = json.loads(response.content)["error"]
    code = error["details"]["error_code"] if _is_anthropics(case) else error["code"]
    assert code in BEYOND_A_SCHEMA, f"refused with {response.status_code}: {error}"


@schemathesis.check
def errors_have_the_shape_of_their_api(ctx: Any, response: Any, case: Any) -> None:
    if response.status_code < 400:
        return
    tree = json.loads(response.content)
    error = tree["error"]
    if _is_anthropics(case):
        assert set(tree) == {"type", "error", "request_id"}
        assert set(error) == {"message", "type", "details"}
        assert response.headers["request-id"] == [tree["request_id"]]
    else:
        assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


def _is_anthropics(case: Any) -> bool:
    return str(case.path).startswith("/v1/messages")
