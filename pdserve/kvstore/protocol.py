"""What clients and store nodes say to each other. Every message of a client is answered, but for
``Released``.

A client on the node's host maps the arena: its messages carry no block bytes, and its ``Commit``
brings the checksums. Any other client sends bytes in the bodies of ``Fill`` and gets them in the
body of ``BlockHeaders``; the node checks what arrives before it answers.

An answer may be an ``ErrorInfo`` instead: ``StoreError``, ``CapacityError``, or ``FrameError`` for
what a correct client never sends.
"""

from dataclasses import dataclass

from pdserve.ids import BlockKey, RequestId, SlotId, StoreId, TicketId
from pdserve.kvstore import admin
from pdserve.kvstore.answers import ClaimGrant, PrefixQuote, StoreChanges, StoreStat, WriteGrant
from pdserve.kvstore.masters import mastering
from pdserve.wire.codec import Codec


@dataclass(frozen=True, slots=True)
class Greet:
    """The first message on a connection. ``owner`` is who tickets name as their reader."""

    owner: str
    shares_memory: bool = False  # it maps the node's files, whose descriptors come with the answer
    pins: bool = False  # and is able to pin blocks by itself
    token: str = ""  # of ``capability``, for a node that wants one


@dataclass(frozen=True, slots=True)
class Welcome:
    store_id: StoreId
    block_bytes: int
    arena_path: str  # for clients on the same host that write
    codec: int = 0  # of all blocks; a ``PayloadCodec``
    has_disk: bool = False  # which may know what the index does not
    files: tuple[str, ...] = ()  # what the descriptors that come along are of
    key_prefix: bytes = b""  # with which all keys of this client begin
    epoch: int = 0  # under which the node is a member; 0: of nothing
    # Of a node that also serves one-sided reads, of slots from this address on.
    segment: str = ""
    payload_address: int = 0
    stride_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ClaimPrefix:
    keys: tuple[BlockKey, ...]
    fetch: bool = True  # wait for what the disk has of it
    tenant: str = ""  # on whose account what comes up from there goes


@dataclass(frozen=True, slots=True)
class QuotePrefix:
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class Released:
    """For a client that pins by itself, and the one message that is not answered: it has let some
    of its pins go. ``asked`` are the keys, joined, of each prompt that has looked for its blocks
    since the last such message."""

    asked: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ReadBlocks:
    """Answered with those of ``indices`` that come before the first one that cannot be read."""

    claim: int
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FetchBlocks:
    """Claim ``keys``, read those from ``first`` on, release: one round trip. Answered with those
    that are stored, at most ``count``."""

    keys: tuple[BlockKey, ...]
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class BlockHeader:
    generation: int
    checksum: int
    key: BlockKey | None
    codec: int = 0


@dataclass(frozen=True, slots=True)
class BlockHeaders:
    """Of the blocks in the body, one after the other."""

    headers: tuple[BlockHeader, ...]


@dataclass(frozen=True, slots=True)
class DescribeBlocks:
    """As ``ReadBlocks``, but answered without the bytes: the client reads them itself."""

    claim: int
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CondemnBlock:
    claim: int
    index: int


@dataclass(frozen=True, slots=True)
class CondemnSlot:
    """As ``CondemnBlock``, of a block that the client has pinned by itself."""

    slot: SlotId
    generation: int


@dataclass(frozen=True, slots=True)
class ReleaseClaim:
    claim: int


@dataclass(frozen=True, slots=True)
class Reserve:
    keys: tuple[BlockKey, ...]
    first: int
    tenant: str = ""


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
class PullBlocks:
    """As ``Fill``, but the node reads the bytes itself, at ``address`` of ``segment``."""

    write: int
    position: int
    checksums: tuple[int, ...]
    verify: bool
    segment: str
    address: int


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
    tenant: str = ""


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
class AbortAttempts:
    request: RequestId
    attempt: int | None  # this one and earlier ones; None: all


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
        QuotePrefix,
        PrefixQuote,
        Released,
        ReadBlocks,
        FetchBlocks,
        BlockHeader,
        BlockHeaders,
        DescribeBlocks,
        CondemnBlock,
        CondemnSlot,
        ReleaseClaim,
        Reserve,
        ReservePush,
        ReserveTail,
        WriteGrant,
        Fill,
        PullBlocks,
        Commit,
        Committed,
        Abandon,
        OpenTicket,
        TicketOpened,
        SealTicket,
        AbortTicket,
        AbortAttempts,
        AdoptTicket,
        ListChanges,
        StoreChanges,
        AskStat,
        StoreStat,
        Done,
        *admin.MESSAGES,
        *mastering.MESSAGES,
    )
)
