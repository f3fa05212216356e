"""The routes of files and batches. What they take and give is said in ``http.openapi``."""

import json
import secrets
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from pdserve.clock import unix_ms
from pdserve.cluster.gateway.parameters import shown
from pdserve.cluster.http.access import owner_in
from pdserve.cluster.http.batches.files import PURPOSE, Files, unknown
from pdserve.cluster.http.batches.form import fields_of_form
from pdserve.cluster.http.batches.lines import ENDPOINTS
from pdserve.cluster.http.batches.running import OPEN, Batches, cancelled
from pdserve.cluster.http.batches.states import Record, decoded, new_batch, window_s_of
from pdserve.cluster.http.bodies import read_bytes, read_object
from pdserve.cluster.http.queries import number_in, page_of, word_in
from pdserve.cluster.http.responses.asking import check_metadata
from pdserve.cluster.http.schemas import Body, checked
from pdserve.config import GatewayConfig
from pdserve.errors import IllegalTransition, InvalidField, UnknownRequest, UnusableValue
from pdserve.kvstore.documents import Documents, New

FILES, BATCHES = "/v1/files", "/v1/batches"

FILES_PAGE_MAX = 10_000
BATCHES_PAGE, BATCHES_PAGE_MAX = 20, 100

KEEP_S_MIN, KEEP_S_MAX = 3600, 30 * 24 * 3600
"""Of a file that is uploaded with ``expires_after``."""

FORM_FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")
FILENAME_CHARACTERS_MAX = 255
FORM_BYTES = 64 * 1024
"""What a form may have beside its file."""


class BatchBody(Body):
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: dict[str, Any] | None = None


def add_files(app: FastAPI, files: Files, config: GatewayConfig) -> None:
    @app.post(FILES)
    async def upload_file(request: Request) -> Response:
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "multipart/form-data":
            raise HTTPException(415, f"content-type is {shown(kind)}, must be multipart/form-data")
        body = await read_bytes(request, config.batches.file_bytes_max + FORM_BYTES)
        form = fields_of_form(kind, body, FORM_FIELDS)
        for name in ("file", "purpose"):
            if name not in form:
                raise InvalidField(name, "is missing")
        purpose = form["purpose"].text("purpose")
        if purpose != PURPOSE:
            raise InvalidField("purpose", f"is {shown(purpose)}, must be {PURPOSE}")
        file = form["file"]
        filename = file.filename or "file"
        if len(filename) > FILENAME_CHARACTERS_MAX:
            raise InvalidField(
                "file", f"has a name of more than {FILENAME_CHARACTERS_MAX} characters"
            )
        if not 1 <= len(file.data) <= config.batches.file_bytes_max:
            raise InvalidField(
                "file",
                f"has {len(file.data)} bytes, must have 1 to {config.batches.file_bytes_max}",
            )
        keep_s = _keep_s({name: each.text(name) for name, each in form.items() if name != "file"})
        return _json(
            await files.upload(owner_in(request.scope), filename, file.data, keep_s=keep_s)
        )

    @app.get(FILES)
    async def list_files(request: Request) -> Response:
        query = request.query_params
        limit = number_in(query, "limit", 1, FILES_PAGE_MAX) or FILES_PAGE_MAX
        order = word_in(query, "order", ("asc", "desc")) or "desc"
        found = await files.listed(owner_in(request.scope))
        if (purpose := query.get("purpose")) is not None:
            found = [file for file in found if file["purpose"] == purpose]
        return _json(page_of(found if order == "asc" else found[::-1], query.get("after"), limit))

    one = f"{FILES}/{{file_id}}"

    @app.get(one)
    async def retrieve_file(file_id: str, request: Request) -> Response:
        return _json(await files.found(file_id, owner_in(request.scope)))

    @app.delete(one)
    async def delete_file(file_id: str, request: Request) -> Response:
        await files.remove(file_id, owner_in(request.scope))
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    @app.get(f"{one}/content")
    async def file_content(file_id: str, request: Request) -> Response:
        data = await files.content(file_id, owner_in(request.scope))
        return Response(data, media_type="application/octet-stream")


def add_batches(
    app: FastAPI, files: Files, documents: Documents, batches: Batches, config: GatewayConfig
) -> None:
    async def found(name: str, owner: str) -> Record:
        batches.start()  # what another gateway left is gone on with wherever somebody looks
        record = await batches.record(name) if name.startswith("batch_") else None
        if record is None or record.owner != owner:
            raise unknown("batch_id", f"Batch with id {shown(name)} not found")
        return record

    @app.post(BATCHES)
    async def create_batch(request: Request) -> Response:
        body = checked(BatchBody, await read_object(request, config.body_bytes_max))
        owner = owner_in(request.scope)
        record = await _new_batch(body, owner, files)
        await documents.make(
            New(
                name=record.name,
                state=record.encoded(),
                groups=[f"batches:{owner}", OPEN],
                keep_s=config.batches.keep_s,
                count_max=config.batches.batches_max,
            )
        )
        batches.start()
        return _json(record.batch)

    @app.get(BATCHES)
    async def list_batches(request: Request) -> Response:
        query, owner = request.query_params, owner_in(request.scope)
        limit = number_in(query, "limit", 1, BATCHES_PAGE_MAX) or BATCHES_PAGE
        states = await documents.states(f"batches:{owner}")
        known = [decoded(state).batch for state in reversed(states)]
        return _json(page_of(known, query.get("after"), limit))

    one = f"{BATCHES}/{{batch_id}}"

    @app.get(one)
    async def retrieve_batch(batch_id: str, request: Request) -> Response:
        return _json((await found(batch_id, owner_in(request.scope))).batch)

    @app.post(f"{one}/cancel")
    async def cancel_batch(batch_id: str, request: Request) -> Response:
        await found(batch_id, owner_in(request.scope))
        now_s = unix_ms() // 1000
        try:
            record = await batches.update(batch_id, lambda each: cancelled(each, now_s))
        except IllegalTransition as error:
            raise UnusableValue("batch_id", f"cannot be cancelled: {error}") from None
        if record is None:
            raise unknown("batch_id", f"Batch with id {shown(batch_id)} not found")
        batches.start()
        return _json(record.batch)


async def _new_batch(body: BatchBody, owner: str, files: Files) -> Record:
    """
    Raises:
        InvalidField, UnusableValue: naming what is wrong.
    """
    if body.endpoint not in ENDPOINTS:
        raise InvalidField(
            "endpoint", f"is {shown(body.endpoint)}, must be one of {', '.join(ENDPOINTS)}"
        )
    window_s = window_s_of(body.completion_window)
    if window_s is None:
        raise InvalidField(
            "completion_window",
            f"is {shown(body.completion_window)}, must be such as 24h: a number and s, m, h or d, "
            "at most 7d",
        )
    check_metadata(body.metadata or {})
    if body.output_expires_after is not None:
        raise InvalidField(
            "output_expires_after", "is not supported; files of answers are kept as batches are"
        )
    try:
        file = await files.found(body.input_file_id, owner)
    except UnknownRequest:
        raise UnusableValue(
            "input_file_id", f"is {shown(body.input_file_id)}, which is not found"
        ) from None
    if file["purpose"] != PURPOSE:
        raise UnusableValue("input_file_id", f"is of the purpose {file['purpose']}, not {PURPOSE}")
    return new_batch(
        f"batch_{secrets.token_hex(12)}",
        owner,
        endpoint=body.endpoint,
        input_file=body.input_file_id,
        window=body.completion_window,
        window_s=window_s,
        metadata=body.metadata,
        now_s=unix_ms() // 1000,
    )


def _keep_s(form: Mapping[str, str]) -> float | None:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidField("expires_after[anchor]", f"is {shown(anchor)}, must be created_at")
    text = seconds or ""
    is_whole = text.isascii() and text.isdigit() and len(text) <= 9
    if not is_whole or not KEEP_S_MIN <= int(text) <= KEEP_S_MAX:
        raise InvalidField(
            "expires_after[seconds]",
            f"is {shown(seconds)}, must be from {KEEP_S_MIN} to {KEEP_S_MAX}",
        )
    return float(text)


def _json(tree: Mapping[str, Any]) -> Response:
    return Response(json.dumps(tree, ensure_ascii=False), media_type="application/json")
