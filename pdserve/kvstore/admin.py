"""What those who run a store say to its nodes, and what these answer; part of ``protocol``."""

from collections.abc import Mapping
from dataclasses import dataclass

from pdserve.ids import BlockKey
from pdserve.kvstore.answers import StoreStat
from pdserve.kvstore.phases import PhaseTimes
from pdserve.kvstore.shares import TenantUse


@dataclass(frozen=True, slots=True)
class PinPrefix:
    """Keep what is stored of a prefix: ``pins`` says how. ``Counted`` says how many blocks."""

    keys: tuple[BlockKey, ...]
    hard: bool
    lifetime_ms: int | None  # None: as long as the node lives


@dataclass(frozen=True, slots=True)
class UnpinPrefix:
    """``Counted``: blocks that had a pin and have none now."""

    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class EvictPrompt:
    """``Counted``: its blocks, and what builds on the whole of it, as far as nobody holds them."""

    keys: tuple[BlockKey, ...]
    pinned: bool  # those with pins too


@dataclass(frozen=True, slots=True)
class EvictAll:
    tenant: str | None  # None: everybody's
    pinned: bool


@dataclass(frozen=True, slots=True)
class Counted:
    blocks: int


@dataclass(frozen=True, slots=True)
class SetDraining:
    """While a node drains it finds nothing and takes no new put or ticket; what is under way goes
    on. To be asked again, by ``AskReport``, until nothing is."""

    draining: bool


@dataclass(frozen=True, slots=True)
class Prefetch:
    """A prompt is on its way here: what the disk has of its prefix may come up meanwhile."""

    keys: tuple[BlockKey, ...]
    tenant: str


@dataclass(frozen=True, slots=True)
class NotePhases:
    times: tuple[PhaseTimes, ...]


@dataclass(frozen=True, slots=True)
class AskReport:
    pass


@dataclass(frozen=True, slots=True)
class StoreReport:
    """All that a node can say of itself. Linear in its arena."""

    block_bytes: int
    draining: bool
    stat: StoreStat
    pins: Mapping[str, int]  # blocks with soft and hard pins, and how many may have hard ones
    tenants: tuple[TenantUse, ...]  # largest first
    counters: Mapping[str, int]  # ``operations.COUNTERS``, since the node's start; ``vitals``
    phases: tuple[PhaseTimes, ...]
    epoch: int = 0  # under which it is a member; 0: of nothing
    masters: tuple[str, ...] = ()  # host:port of each, or the path of its socket


@dataclass(frozen=True, slots=True)
class AskAudit:
    """``blocks_max``: checksums of at most so many blocks; None: of all."""

    blocks_max: int | None


@dataclass(frozen=True, slots=True)
class AuditReport:
    slots: int
    verified: int  # blocks whose checksum was computed
    findings: tuple[str, ...]  # empty: all is as it should be


MESSAGES = (
    PinPrefix,
    UnpinPrefix,
    EvictPrompt,
    EvictAll,
    Counted,
    SetDraining,
    Prefetch,
    NotePhases,
    AskReport,
    StoreReport,
    AskAudit,
    AuditReport,
)
