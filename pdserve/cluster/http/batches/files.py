"""Uploaded files, and those that batches write, each of one tenant."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdserve.clock import unix_ms
from pdserve.cluster.gateway.parameters import shown
from pdserve.cluster.http.batches.states import Record
from pdserve.config import GatewayConfig
from pdserve.errors import UnknownRequest
from pdserve.kvstore.documents import Documents, MemoryDocuments, New, RedisDocuments

PURPOSE = "batch"
OUTPUT_PURPOSE = "batch_output"


@dataclass(frozen=True, slots=True)
class File:
    owner: str  # the tenant; empty where there are no keys
    file: Mapping[str, Any]  # OpenAI's ``FileObject``

    def encoded(self) -> bytes:
        return json.dumps({"owner": self.owner, "file": self.file}).encode()


class Files:
    def __init__(self, documents: Documents, config: GatewayConfig) -> None:
        self._documents = documents
        self._config = config.batches

    async def upload(
        self, owner: str, filename: str, data: bytes, *, keep_s: float | None
    ) -> Mapping[str, Any]:
        """
        Raises:
            CapacityError: the tenant has as many as it may have, or there is no room.
            StoreUnavailable
        """
        name = f"file-{secrets.token_hex(12)}"
        groups = [f"uploads:{owner}", f"files:{owner}"]
        keep_s = min(keep_s or self._config.keep_s, self._config.keep_s)
        file = _file(name, filename, data, PURPOSE, keep_s)
        await self._documents.make(
            New(
                name=name,
                state=File(owner, file).encoded(),
                groups=groups,
                content=data,
                keep_s=keep_s,
                count_max=self._config.files_max,
            )
        )
        return file

    async def write(self, record: Record, kind: str, data: bytes) -> str | None:
        """A batch's file; whoever writes it again writes the same. None: an empty one is none."""
        if not data:
            return None
        name = f"file-{record.name.removeprefix('batch_')}-{kind}"
        file = _file(name, f"{record.name}_{kind}.jsonl", data, OUTPUT_PURPOSE, self._config.keep_s)
        await self._documents.make(
            New(
                name=name,
                state=File(record.owner, file).encoded(),
                groups=[f"files:{record.owner}"],
                content=data,
                keep_s=self._config.keep_s,
            )
        )
        return name

    async def found(self, name: str, owner: str) -> Mapping[str, Any]:
        """
        Raises:
            UnknownRequest: there is none, or it is another tenant's, which looks the same.
            StoreUnavailable
        """
        data = await self._documents.state(name) if name.startswith("file-") else None
        file = None if data is None else File(**json.loads(data))
        if file is None or file.owner != owner:
            raise unknown("file_id", f"File with id {shown(name)} not found")
        return file.file

    async def listed(self, owner: str) -> list[Mapping[str, Any]]:
        """The oldest first."""
        states = await self._documents.states(f"files:{owner}")
        return [File(**json.loads(state)).file for state in states]

    async def content(self, name: str, owner: str) -> bytes:
        await self.found(name, owner)
        data = await self._documents.content(name)
        if data is None:
            raise unknown("file_id", f"File with id {shown(name)} not found")
        return data

    async def remove(self, name: str, owner: str) -> None:
        await self.found(name, owner)
        await self._documents.remove(name)


def documents_of(config: GatewayConfig) -> Documents:
    """Where this gateway keeps files and batches.

    Raises:
        ConfigError
    """
    if config.responses_redis is not None:
        return RedisDocuments(config.responses_redis, bytes_max=config.batches.kept_bytes_max)
    return MemoryDocuments(bytes_max=config.batches.kept_bytes_max)


def unknown(field: str, message: str) -> UnknownRequest:
    error = UnknownRequest(message)
    error.field = field
    return error


def _file(name: str, filename: str, data: bytes, purpose: str, keep_s: float) -> dict[str, Any]:
    now_s = unix_ms() // 1000
    return {
        "id": name,
        "object": "file",
        "bytes": len(data),
        "created_at": now_s,
        "expires_at": now_s + round(keep_s),
        "filename": filename,
        "purpose": purpose,
        "status": "processed",
        "status_details": None,
    }
