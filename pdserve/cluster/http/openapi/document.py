"""The operations of the HTTP front, as OpenAPI 3.1. A test compares them with its routes."""

from collections.abc import Iterable, Mapping
from typing import Any

from pdserve.cluster.http.access import OPEN_PATHS
from pdserve.cluster.http.asking import WHY_HEADER
from pdserve.cluster.http.hints import TIMEOUT_HEADER, TIMEOUT_MS_MAX
from pdserve.cluster.http.messages.errors import PATH as MESSAGES_PATH
from pdserve.cluster.http.messages.errors import speaks_messages
from pdserve.cluster.http.openapi import batches, comparing, decisions
from pdserve.cluster.http.openapi.answers import ANSWERS
from pdserve.cluster.http.openapi.bodies import Facts, bodies
from pdserve.cluster.http.openapi.messages import message_schemas

Schema = dict[str, Any]

_ANY = {"type": "string"}

_STREAMS = "text/event-stream"

_EVENT = {
    "type": "object",
    "description": "One event; its data is JSON, or [DONE] at the end of completions.",
    "properties": {"event": _ANY, "data": _ANY},
    "required": ["data"],
}

_RESPONSE_ID = {
    "name": "response_id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "minLength": 1, "pattern": "^[A-Za-z0-9_-]+$"},
}

_GENERATION = (
    {
        "name": TIMEOUT_HEADER,
        "in": "header",
        "description": "How long the request may take, in milliseconds.",
        "schema": {"type": "integer", "minimum": 1, "maximum": TIMEOUT_MS_MAX},
    },
    {
        "name": WHY_HEADER,
        "in": "header",
        "description": "Whether the answer says what the router decided, and why.",
        "schema": {"enum": ["0", "1", "true", "false"]},
    },
)


def _query(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "query", "schema": schema}


_OF_MODEL = _query("model", {"type": "string"})
"""Which of several models is meant; without it the first, or where that has a sense, all."""


def document(facts: Facts, *, version: str, paths: Iterable[str], keys: bool) -> Schema:
    """
    Args:
        paths: that are served; the document speaks of no other.
        keys: whether one is asked for.
    """
    served = set(paths)
    operations = {path: said for path, said in _OPERATIONS.items() if path in served}
    tree: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "pdserve", "version": version},
        "paths": {
            path: {method: _with_errors(path, said) for method, said in methods.items()}
            for path, methods in operations.items()
        },
        "components": {
            "schemas": {
                **ANSWERS,
                **bodies(facts),
                **comparing.schemas(facts),
                **decisions.schemas(facts),
                **message_schemas(facts),
                **batches.schemas(),
            }
        },
    }
    if keys:
        tree["components"]["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer"},
            "anthropic_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        tree["security"] = [{"key": []}, {"anthropic_key": []}]
        for path in OPEN_PATHS & operations.keys():
            for operation in tree["paths"][path].values():
                operation["security"] = []
    return tree


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(name: str) -> Schema:
    return {"application/json": {"schema": _ref(name)}}


def _with_errors(path: str, operation: Mapping[str, Any]) -> Schema:
    """The operation with what any of them may answer: an error, in the shape of its API."""
    shape = _json("MessageError" if speaks_messages(path) else "Error")
    error = {"description": "What is wrong, and with which field", "content": shape}
    responses = operation["responses"] | {"4XX": error, "5XX": error}
    return {**operation, "responses": responses}


def _operation(
    name: str,
    answer: str,
    *,
    body: str | None = None,
    stream: bool = False,
    parameters: Iterable[Schema] = (),
    content: str | None = None,
) -> Schema:
    """
    Args:
        name: by which generated clients call it.
        answer: of ``ANSWERS``.
        stream: the answer may also be events.
        content: its type where it is not JSON.
    """
    told = {content: {"schema": _ANY}} if content else _json(answer)
    if stream:
        told |= {_STREAMS: {"schema": _EVENT}}
    said: Schema = {
        "operationId": name,
        "parameters": list(parameters),
        "responses": {"200": {"description": "What was asked for", "content": told}},
    }
    if body is not None:
        said["requestBody"] = {"required": True, "content": _json(body)}
    return said


def _generation(name: str, answer: str, body: str) -> Schema:
    return _operation(name, answer, body=body, stream=True, parameters=_GENERATION)


_ONE = "/v1/responses/{response_id}"

_OPERATIONS: dict[str, dict[str, Schema]] = {
    "/v1/chat/completions": {
        "post": _generation("chat", "ChatCompletion", "ChatCompletionRequest")
    },
    "/v1/completions": {"post": _generation("complete", "Completion", "CompletionRequest")},
    "/v1/embeddings": {
        "post": _operation(
            "embed", "EmbeddingList", body="EmbeddingRequest", parameters=_GENERATION[:1]
        )
    },
    MESSAGES_PATH: {"post": _generation("create_message", "Message", "MessageRequest")},
    f"{MESSAGES_PATH}/count_tokens": {
        "post": _operation("count_message_tokens", "MessageCount", body="MessageCountRequest")
    },
    "/v1/responses": {"post": _generation("create_response", "Response", "ResponseRequest")},
    "/v1/responses/input_tokens": {
        "post": _operation("count_input_tokens", "InputTokens", body="ResponseRequest")
    },
    _ONE: {
        "get": _operation(
            "retrieve_response",
            "Response",
            stream=True,
            parameters=(
                _RESPONSE_ID,
                _query("stream", {"type": "boolean"}),
                _query("starting_after", {"type": "integer", "minimum": 0, "maximum": 2**31}),
            ),
        ),
        "delete": _operation("delete_response", "ResponseDeleted", parameters=[_RESPONSE_ID]),
    },
    f"{_ONE}/cancel": {
        "post": _operation("cancel_response", "Response", parameters=[_RESPONSE_ID])
    },
    f"{_ONE}/input_items": {
        "get": _operation(
            "list_input_items",
            "ItemList",
            parameters=(
                _RESPONSE_ID,
                _query("limit", {"type": "integer", "minimum": 1, "maximum": 100}),
                _query("order", {"enum": ["asc", "desc"]}),
                _query("after", {"type": "string"}),
            ),
        )
    },
    "/v1/models": {"get": _operation("list_models", "ModelList")},
    "/v1/models/{model}": {
        "get": _operation(
            "retrieve_model",
            "Model",
            parameters=[
                {
                    "name": "model",
                    "in": "path",
                    "required": True,
                    "schema": {"type": "string", "minLength": 1},
                }
            ],
        )
    },
    "/tokenize": {"post": _operation("tokenize", "Tokens", body="TokenizeRequest")},
    "/detokenize": {"post": _operation("detokenize", "Text", body="DetokenizeRequest")},
    "/tokenizer_info": {
        "get": _operation("tokenizer_info", "TokenizerInfo", parameters=[_OF_MODEL])
    },
    "/health": {"get": _operation("health", "Health")},
    "/ping": {
        "get": _operation("ping", "Health"),
        "post": _operation("ping_by_post", "Health"),
    },
    "/v2/health/live": {"get": _operation("is_live", "Live")},
    "/v2/health/ready": {"get": _operation("is_ready", "Ready")},
    "/version": {"get": _operation("version", "Version")},
    "/load": {"get": _operation("load", "Load")},
    "/metrics": {"get": _operation("metrics", "", content="text/plain")},
    "/cluster/status": {"get": _operation("cluster_status", "Figures", parameters=[_OF_MODEL])},
    "/cluster/requests": {"get": _operation("cluster_requests", "Figures")},
    "/cluster/recording": {
        "get": _operation("cluster_recording", "Figures", parameters=[_OF_MODEL])
    },
    "/cluster/autoscaling": {"get": _operation("autoscaling", "Figures", parameters=[_OF_MODEL])},
    "/cluster/autoscaling/observations": {
        "get": _operation("autoscaling_observations", "Figures", parameters=[_OF_MODEL])
    },
    "/cluster/role": {"post": _operation("assign_role", "Figures", body="RoleRequest")},
}
_OPERATIONS |= comparing.operations(_operation) | decisions.operations(_operation)
_OPERATIONS |= batches.operations(_operation)
