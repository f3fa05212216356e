"""What clients, nodes and operators say to a master, any of them.

One that stands by answers ``NotLeading`` to what only a leader knows; the tables of the metadata it
reads and changes for anybody who asks. The first message is ``protocol.Greet``.
"""

from dataclasses import dataclass

from pdserve.ids import StoreId
from pdserve.kvstore import protocol
from pdserve.kvstore.masters.metadata import Member, Seat
from pdserve.messages import Address
from pdserve.wire.codec import Codec


@dataclass(frozen=True, slots=True)
class Locate:
    """Who has the blocks of a chain. ``reads``: how often they were read from elsewhere since this
    client last asked, this time included."""

    keys: bytes  # joined, from the chain's first
    reads: int = 1


@dataclass(frozen=True, slots=True)
class Location:
    store_id: StoreId
    address: Address
    epoch: int
    count: int  # leading blocks of the chain that it has


@dataclass(frozen=True, slots=True)
class Located:
    """Those with most first."""

    locations: tuple[Location, ...]


@dataclass(frozen=True, slots=True)
class NotLeading:
    """``leader`` may know more; None: nobody leads, as far as this master knows."""

    leader: Address | None


@dataclass(frozen=True, slots=True)
class Vacate:
    """Copy what only this node has to others, what writes and hand-offs under way bring included,
    until it is done or the time is up. ``Vacated``."""

    store_id: StoreId
    deadline_ms: int


@dataclass(frozen=True, slots=True)
class Vacated:
    moved: int  # blocks copied
    left: int  # that only this node has now
    outweighed: int  # of those: all that might have gone for them elsewhere was worth more


@dataclass(frozen=True, slots=True)
class AskMaster:
    pass


@dataclass(frozen=True, slots=True)
class MemberReport:
    store_id: StoreId
    address: Address
    epoch: int
    is_in: bool  # the master has its inventory
    is_draining: bool
    blocks: int
    slots_free: int


@dataclass(frozen=True, slots=True)
class MasterReport:
    """Of a leader; of one that stands by only who it is, and whom it follows."""

    master: str
    epoch: int  # 0: it stands by
    seat: Seat | None
    members: tuple[MemberReport, ...] = ()
    blocks: int = 0
    locations: int = 0
    index_bytes: int = 0
    is_whole: bool = False  # the inventory of every member is in
    rebuild_ms: int = 0  # from its election until that was so for the first time
    replicas: int = 0  # blocks copied because they were read often
    moved: int = 0  # blocks copied because their node was to be emptied
    gaps: int = 0  # inventories asked again
    removed: int = 0  # members that answered no more
    fenced: int = 0  # answers under an old epoch


@dataclass(frozen=True, slots=True)
class NextEpoch:
    above: int


@dataclass(frozen=True, slots=True)
class Epoch:
    epoch: int


@dataclass(frozen=True, slots=True)
class Register:
    member: Member


@dataclass(frozen=True, slots=True)
class Remove:
    store_id: StoreId
    epoch: int


@dataclass(frozen=True, slots=True)
class AskMembers:
    pass


@dataclass(frozen=True, slots=True)
class Members:
    members: tuple[Member, ...]


MASTER_PROTOCOL = Codec(
    (
        protocol.Greet,
        protocol.Done,
        Locate,
        Located,
        NotLeading,
        Vacate,
        Vacated,
        AskMaster,
        MasterReport,
        NextEpoch,
        Epoch,
        Register,
        Remove,
        AskMembers,
        Members,
    )
)
