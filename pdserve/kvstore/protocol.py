"""What clients and store nodes say to each other. Every message of a client is answered.

A client on the node's host maps the arena: its messages carry no block bytes, and its ``Commit``
brings the checksums. Any other client sends bytes in the bodies of ``Fill`` and gets them in the
body of ``BlockHeader``; the node checks what arrives before it answers.

An answer may be an ``ErrorInfo`` instead: ``StoreError``, ``CapacityError``, or ``FrameError`` for
what a correct client never sends.
"""

from dataclasses import dataclass

from pdserve.ids import BlockKey, RequestId, StoreId, TicketId
from pdserve.kvstore.answers import ClaimGrant, StoreChanges, StoreStat, WriteGrant
from pdserve.wire.codec import Codec


@dataclass(frozen=True, slots=True)
class Greet:
    """The first message on a connection. ``owner`` is who tickets name as their reader."""

    owner: str


@dataclass(frozen=True, slots=True)
class Welcome:
    store_id: StoreId
    block_bytes: int
    arena_path: str  # for clients on the same host


@dataclass(frozen=True, slots=True)
class ClaimPrefix:
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class ReadBlock:
    claim: int
    index: int


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """Of the block in the body."""

    generation: int
    checksum: int
    key: BlockKey | None


@dataclass(frozen=True, slots=True)
class CondemnBlock:
    claim: int
    index: int


@dataclass(frozen=True, slots=True)
class ReleaseClaim:
    claim: int


@dataclass(frozen=True, slots=True)
class Reserve:
    keys: tuple[BlockKey, ...]
    first: int


@dataclass(frozen=True, slots=True)
class ReservePush:
    ticket: TicketId
    keys: tuple[BlockKey, ...]
    first: int


@dataclass(frozen=True, slots=True)
class ReserveTail:
    ticket: TicketId


@dataclass(frozen=True, slots=True)
class Fill:
    """Block bytes, in the body, for consecutive slots of a write, from ``position`` on."""

    write: int
    position: int
    checksums: tuple[int, ...]  # one per block in the body
    verify: bool


@dataclass(frozen=True, slots=True)
class Commit:
    write: int
    checksums: tuple[int, ...] | None  # None: the node has them from ``Fill``


@dataclass(frozen=True, slots=True)
class Committed:
    stored_count: int


@dataclass(frozen=True, slots=True)
class Abandon:
    write: int


@dataclass(frozen=True, slots=True)
class OpenTicket:
    """Answered when the ticket's slots are reserved, or the wait for them is over."""

    request: RequestId
    attempt: int
    reader: str
    block_count: int
    wait_ms: int


@dataclass(frozen=True, slots=True)
class TicketOpened:
    ticket: TicketId


@dataclass(frozen=True, slots=True)
class SealTicket:
    ticket: TicketId


@dataclass(frozen=True, slots=True)
class AbortTicket:
    ticket: TicketId


@dataclass(frozen=True, slots=True)
class AdoptTicket:
    ticket: TicketId


@dataclass(frozen=True, slots=True)
class ListChanges:
    after: int


@dataclass(frozen=True, slots=True)
class AskStat:
    pass


@dataclass(frozen=True, slots=True)
class Done:
    pass


PROTOCOL = Codec(
    (
        Greet,
        Welcome,
        ClaimPrefix,
        ClaimGrant,
        ReadBlock,
        BlockHeader,
        CondemnBlock,
        ReleaseClaim,
        Reserve,
        ReservePush,
        ReserveTail,
        WriteGrant,
        Fill,
        Commit,
        Committed,
        Abandon,
        OpenTicket,
        TicketOpened,
        SealTicket,
        AbortTicket,
        AdoptTicket,
        ListChanges,
        StoreChanges,
        AskStat,
        StoreStat,
        Done,
    )
)
