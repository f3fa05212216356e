"""The register of the router's terms, in the key-value store of Ray's own control service.

It is there wherever Ray is, on one host or many, and with an external Redis behind it, it survives
the head. One key per term, written once: putting a key that exists changes nothing, which is all
the agreement that ``router.succession`` needs.
"""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from typing import Any, Protocol, TypeVar

from pdserve.errors import StoreUnavailable
from pdserve.ids import HostId
from pdserve.messages import Address
from pdserve.router.succession import Term

NAMESPACE = b"pdserve"
TERMS_KEPT = 16
"""Entries that stay; whoever still believes in an older one finds a younger one beside it."""

TIMEOUT_S = 2.0

T = TypeVar("T")


class Register(Protocol):
    """Both raise ``StoreUnavailable`` when the register cannot be reached."""

    async def latest(self) -> Term | None: ...

    async def claim(self, term: Term) -> Term | None:
        """Enters ``term`` unless its epoch has an entry; the latest one then."""
        ...


class MemoryTerms:
    """The terms of routers that share a process, where there is no Ray."""

    def __init__(self) -> None:
        self.terms: dict[int, Address] = {}

    async def latest(self) -> Term | None:
        last = max(self.terms, default=0)
        return Term(last, self.terms[last]) if last else None

    async def claim(self, term: Term) -> Term | None:
        self.terms.setdefault(term.epoch, term.leader)
        return await self.latest()


class RayTerms:
    """One application's terms. One call at a time: while Ray's service is down each would hold a
    thread until it is back."""

    def __init__(self, app: str) -> None:
        self._prefix = f"router:{app}:".encode()
        self._thread = ThreadPoolExecutor(1, "terms")
        self._busy = False

    async def latest(self) -> Term | None:
        return await self._ask(self._latest)

    async def claim(self, term: Term) -> Term | None:
        return await self._ask(lambda: self._claim(term))

    async def _ask(self, question: Callable[[], T]) -> T:
        if self._busy:
            raise StoreUnavailable("Ray's control service has not answered the question before")
        self._busy = True
        asking = self._thread.submit(question)
        asking.add_done_callback(lambda _: self._done())
        try:
            async with asyncio.timeout(2 * TIMEOUT_S):
                return await asyncio.wrap_future(asking)
        except Exception as error:  # its client has errors of many kinds, and no base for them
            raise StoreUnavailable(f"Ray's control service does not answer: {error!r}") from error

    def _done(self) -> None:
        self._busy = False

    def _latest(self) -> Term | None:
        keys = _client().internal_kv_keys(self._prefix, NAMESPACE, TIMEOUT_S)
        if not keys:
            return None
        last = max(keys, key=self._epoch_of)
        value = _client().internal_kv_get(last, NAMESPACE, TIMEOUT_S)
        if value is None:
            return None  # swept meanwhile: there is a younger one, and the next look finds it
        host, unix_path, tcp = json.loads(value)
        return Term(self._epoch_of(last), Address(HostId(host), unix_path, tcp))

    def _claim(self, term: Term) -> Term | None:
        value = json.dumps(astuple(term.leader)).encode()
        _client().internal_kv_put(self._key(term.epoch), value, False, NAMESPACE, TIMEOUT_S)
        if term.epoch > TERMS_KEPT:
            swept = self._key(term.epoch - TERMS_KEPT)
            _client().internal_kv_del(swept, False, NAMESPACE, TIMEOUT_S)
        return self._latest()

    def _key(self, epoch: int) -> bytes:
        return self._prefix + str(epoch).encode()

    def _epoch_of(self, key: bytes) -> int:
        return int(key.removeprefix(self._prefix))


def _client() -> Any:
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    return internal_kv_get_gcs_client()
