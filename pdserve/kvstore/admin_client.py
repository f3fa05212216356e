"""What everybody uses of a store node who neither reads nor writes blocks; see ``admin``.

A connection of its own, blocking, for one thread at a time. It maps no arena and holds no block, so
it works the same from another host.
"""

from collections.abc import Sequence
from typing import TypeVar

from pdserve.errors import (
    DeadlineExceeded,
    Disconnected,
    PdserveError,
    StoreUnavailable,
    WireError,
)
from pdserve.ids import BlockKey, HostId, StoreId
from pdserve.kvstore import admin, protocol
from pdserve.kvstore.security import Credentials
from pdserve.messages import Address
from pdserve.wire.blocking import connect_blocking

ANSWER_S = 10.0
AUDIT_S = 600.0
"""All checksums of an arena of 1 TB, beside serving."""

T = TypeVar("T")


class StoreAdmin:
    def __init__(
        self,
        address: Address,
        *,
        host: HostId,
        timeout_s: float = ANSWER_S,
        credentials: Credentials | None = None,
    ) -> None:
        """Connect to a node.

        Args:
            host: of this process.
            credentials: the cluster's, for a node on another host that wants them.

        Raises:
            StoreUnavailable: nobody answers there, or not to this certificate.
            AccessDenied: the node wants a token, and takes none of this key.
            ConfigError: a file of the credentials is of no use.
        """
        credentials = credentials or Credentials()
        self._timeout_s = timeout_s
        try:
            self._connection = connect_blocking(
                address,
                host=host,
                codec=protocol.PROTOCOL,
                ssl_context=credentials.ssl_context(server_side=False),
            )
        except WireError as error:
            raise StoreUnavailable(f"the store node cannot be reached: {error}") from error
        try:
            greeting = protocol.Greet(
                "admin", shares_memory=False, pins=False, token=credentials.worker_token()
            )
            welcome = self._ask(greeting, protocol.Welcome)
        except PdserveError:
            self.close()
            raise
        self.store_id: StoreId = welcome.store_id

    def report(self) -> admin.StoreReport:
        return self._ask(admin.AskReport(), admin.StoreReport)

    def audit(self, blocks_max: int | None = None) -> admin.AuditReport:
        """``blocks_max``: how many checksums are computed; None: all."""
        return self._ask(admin.AskAudit(blocks_max), admin.AuditReport, timeout_s=AUDIT_S)

    def pin(self, keys: Sequence[BlockKey], *, hard: bool, lifetime_ms: int | None = None) -> int:
        """How many leading blocks are stored, and pinned from now on.

        Raises:
            CapacityError: so many hard pins are not allowed; nothing is pinned.
        """
        return self._count(admin.PinPrefix(tuple(keys), hard, lifetime_ms))

    def unpin(self, keys: Sequence[BlockKey]) -> int:
        """Of how many blocks; those that a longer pinned prefix shares keep theirs."""
        return self._count(admin.UnpinPrefix(tuple(keys)))

    def evict_prompt(self, keys: Sequence[BlockKey], *, pinned: bool = False) -> int:
        return self._count(admin.EvictPrompt(tuple(keys), pinned))

    def evict_all(self, *, tenant: str | None = None, pinned: bool = False) -> int:
        """``tenant``: only the blocks on its account."""
        return self._count(admin.EvictAll(tenant, pinned))

    def prefetch(self, keys: Sequence[BlockKey], *, tenant: str = "") -> None:
        """A prompt will ask for these: what of them is on a disk may come up now. Does not wait."""
        self._ask(admin.Prefetch(tuple(keys), tenant), protocol.Done)

    def set_draining(self, draining: bool) -> None:
        self._ask(admin.SetDraining(draining), protocol.Done)

    def close(self) -> None:
        self._connection.close()

    def _count(self, message: object) -> int:
        return self._ask(message, admin.Counted).blocks

    def _ask(self, message: object, expected: type[T], *, timeout_s: float | None = None) -> T:
        try:
            answer = self._connection.call(message, timeout_s=timeout_s or self._timeout_s).message
        except (Disconnected, DeadlineExceeded) as error:
            raise StoreUnavailable(f"the store node is gone: {error}") from error
        if not isinstance(answer, expected):
            self.close()
            raise StoreUnavailable(f"the store node answered {type(answer).__name__}")
        return answer
