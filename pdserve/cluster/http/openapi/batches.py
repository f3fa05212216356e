"""Files and batches, as OpenAPI: what is sent, what comes back."""

from collections.abc import Callable
from typing import Any

from pdserve.cluster.http.batches.files import OUTPUT_PURPOSE, PURPOSE
from pdserve.cluster.http.batches.lines import ENDPOINTS
from pdserve.cluster.http.batches.routes import (
    BATCHES,
    BATCHES_PAGE_MAX,
    FILES,
    FILES_PAGE_MAX,
    KEEP_S_MAX,
    KEEP_S_MIN,
)
from pdserve.cluster.http.batches.states import WINDOW, BatchState
from pdserve.cluster.http.openapi.bodies import (
    FLAG,
    NULL,
    OBJECT,
    TEXT,
    WHOLE,
    Schema,
    array_of,
    metadata,
    nullable,
    object_of,
    whole_number,
)

_STAMPS = [f"{state}_at" for state in BatchState if state is not BatchState.VALIDATING]

_FILE = object_of(
    {
        "id": TEXT,
        "object": {"const": "file"},
        "bytes": WHOLE,
        "created_at": WHOLE,
        "expires_at": WHOLE,
        "filename": TEXT,
        "purpose": {"enum": [PURPOSE, OUTPUT_PURPOSE]},
        "status": {"const": "processed"},
        "status_details": NULL,
    }
)
_PROBLEM = object_of(
    {"code": TEXT, "message": TEXT, "line": nullable(WHOLE), "param": nullable(TEXT)}
)
_BATCH = object_of(
    {
        "id": TEXT,
        "object": {"const": "batch"},
        "endpoint": {"enum": list(ENDPOINTS)},
        "errors": nullable(object_of({"object": {"const": "list"}, "data": array_of(_PROBLEM)})),
        "input_file_id": TEXT,
        "completion_window": TEXT,
        "status": {"enum": [str(state) for state in BatchState]},
        "output_file_id": nullable(TEXT),
        "error_file_id": nullable(TEXT),
        "created_at": WHOLE,
        "expires_at": WHOLE,
        **dict.fromkeys(_STAMPS, nullable(WHOLE)),
        "request_counts": object_of({"total": WHOLE, "completed": WHOLE, "failed": WHOLE}),
        "usage": nullable(OBJECT),
        "metadata": nullable({"type": "object", "additionalProperties": TEXT}),
    }
)


def _list_of(name: str) -> Schema:
    return object_of(
        {
            "object": {"const": "list"},
            "data": array_of({"$ref": f"#/components/schemas/{name}"}),
            "first_id": nullable(TEXT),
            "last_id": nullable(TEXT),
            "has_more": FLAG,
        }
    )


_CREATION: Schema = {
    "type": "object",
    "properties": {
        "model": nullable(TEXT),
        "input_file_id": TEXT,
        "endpoint": {"enum": list(ENDPOINTS)},
        "completion_window": {
            "type": "string",
            "pattern": f"^({WINDOW})$",
            "description": "A number and s, m, h or d; at most 7d.",
        },
        "metadata": nullable(metadata()),
        "output_expires_after": NULL,
    },
    "required": ["input_file_id", "endpoint", "completion_window"],
}

_FORM: Schema = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary", "minLength": 1},
        "purpose": {"enum": [PURPOSE]},
        "expires_after[anchor]": {"enum": ["created_at"]},
        "expires_after[seconds]": whole_number(KEEP_S_MIN, KEEP_S_MAX),
    },
    "required": ["file", "purpose"],
    "dependentRequired": {
        "expires_after[anchor]": ["expires_after[seconds]"],
        "expires_after[seconds]": ["expires_after[anchor]"],
    },
}


def schemas() -> dict[str, Schema]:
    """By name."""
    return {
        "File": _FILE,
        "FileList": _list_of("File"),
        "FileDeleted": object_of(
            {"id": TEXT, "object": {"const": "file"}, "deleted": {"const": True}}
        ),
        "Batch": _BATCH,
        "BatchList": _list_of("Batch"),
        "BatchRequest": _CREATION,
        "FileForm": _FORM,
    }


def operations(operation: Callable[..., Schema]) -> dict[str, dict[str, Any]]:
    """By path and method; ``operation`` is the document's own way to say one."""

    def query(name: str, schema: Schema) -> Schema:
        return {"name": name, "in": "query", "schema": schema}

    def named(name: str) -> Schema:
        text = {"type": "string", "minLength": 1, "pattern": "^[A-Za-z0-9_-]+$"}
        return {"name": name, "in": "path", "required": True, "schema": text}

    file, batch = named("file_id"), named("batch_id")
    form = {"$ref": "#/components/schemas/FileForm"}
    upload = operation("upload_file", "File") | {
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}
    }
    file_page = [
        query("limit", whole_number(1, FILES_PAGE_MAX)),
        query("order", {"enum": ["asc", "desc"]}),
        query("after", TEXT),
        query("purpose", TEXT),
    ]
    batch_page = [query("limit", whole_number(1, BATCHES_PAGE_MAX)), query("after", TEXT)]
    binary = "application/octet-stream"
    return {
        FILES: {
            "post": upload,
            "get": operation("list_files", "FileList", parameters=file_page),
        },
        f"{FILES}/{{file_id}}": {
            "get": operation("retrieve_file", "File", parameters=[file]),
            "delete": operation("delete_file", "FileDeleted", parameters=[file]),
        },
        f"{FILES}/{{file_id}}/content": {
            "get": operation("file_content", "", content=binary, parameters=[file])
        },
        BATCHES: {
            "post": operation("create_batch", "Batch", body="BatchRequest"),
            "get": operation("list_batches", "BatchList", parameters=batch_page),
        },
        f"{BATCHES}/{{batch_id}}": {
            "get": operation("retrieve_batch", "Batch", parameters=[batch])
        },
        f"{BATCHES}/{{batch_id}}/cancel": {
            "post": operation("cancel_batch", "Batch", parameters=[batch])
        },
    }
