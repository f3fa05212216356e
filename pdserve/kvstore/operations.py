"""The shell's side of running a store: pins, evictions, draining, the report and the audit.

An audit reads the books in one go, a microsecond or two for each slot, and the arena in pieces,
between which the node serves: each block is looked at while nothing can happen to it, and what came
or went since the audit began is as it was found.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice

from pdserve.clock import MS, Clock
from pdserve.errors import CapacityError, FrameError
from pdserve.ids import SlotId
from pdserve.kvstore import admin
from pdserve.kvstore.answers import StoreStat
from pdserve.kvstore.arena import Arena, block_checksum
from pdserve.kvstore.audit import misfits
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.evicting import blocks_of_all, blocks_of_prompt, blocks_of_tenant, evict
from pdserve.kvstore.phases import Phases
from pdserve.kvstore.pins import FOREVER_NS
from pdserve.kvstore.slot_states import SlotState
from pdserve.kvstore.ssd.tier import SsdTier
from pdserve.kvstore.tickets import RETRY_AFTER_MS
from pdserve.vitals import Vitals

COUNTERS = (
    "claims",  # prompts that asked for their prefix
    "blocks_asked",
    "blocks_found_memory",
    "blocks_found_disk",  # came up from the disk for the claim that waited
    "blocks_prefetched",  # came up before they were claimed
)

FINDINGS_MAX = 100
"""That one audit tells; more are not worth reading."""

PIECE_BYTES = 4 << 20
"""Of blocks verified between two looks at the sockets: 0.2 to 1 ms."""

PIECE_SLOTS = 256

LIFETIME_MS_MAX = 365 * 24 * 3600 * 1000


class Operations:
    def __init__(
        self,
        core: StoreCore,
        arena: Arena,
        ssd: SsdTier | None,
        *,
        clock: Clock,
        settle: Callable[[], object],
    ) -> None:
        """``settle`` writes what the core's books have changed; before headers are compared."""
        self._core = core
        self._arena = arena
        self._ssd = ssd
        self.clock = clock
        self._settle = settle
        self.draining = False
        self.epoch = 0
        self.masters: tuple[str, ...] = ()
        self._auditing = False
        self._vitals = Vitals()
        self.phases = Phases()
        self.counters = Counter(dict.fromkeys(COUNTERS, 0))

    def refuse_if_draining(self) -> None:
        if self.draining:
            raise CapacityError(
                "this store node is draining and takes no new blocks; put them elsewhere, or end "
                "the draining (pdserve kv drain --undo)",
                retry_after_ms=RETRY_AFTER_MS,
            )

    def note_claim(self, *, asked: int, found: int, fetched: int, elapsed_ns: int) -> None:
        """``fetched``: of those found, how many it had to wait for."""
        self.phases.note(("claim", "memory"), elapsed_ns)
        self.count_claim(asked=asked, found=found, fetched=fetched)

    def count_claim(self, *, asked: int, found: int, fetched: int = 0) -> None:
        """``note_claim`` for a reader that found and pinned them by itself."""
        from_disk = min(found, fetched)
        self.counters["claims"] += 1
        self.counters["blocks_asked"] += asked
        self.counters["blocks_found_disk"] += from_disk
        self.counters["blocks_found_memory"] += found - from_disk

    def _tell_readers(self) -> None:
        """Those that look by themselves find nothing while this drains, like all others."""
        every = blocks_of_all(self._core.slots)
        if self.draining:
            self._core.room.hide(every)
        else:
            self._core.slots.tell_again(every)
            self._settle()

    def decide(self, message: object) -> object | None:  # noqa: PLR0911
        """The answer to a message of ``admin``; None to those that are only heard."""
        slots, pins = self._core.slots, self._core.pins
        match message:
            case admin.PinPrefix():
                return admin.Counted(self._pin(message))
            case admin.UnpinPrefix(keys):
                return admin.Counted(pins.unpin(slots.lookup(keys)))
            case admin.EvictPrompt(keys, pinned):
                return self._evict(blocks_of_prompt(slots, keys), pinned=pinned)
            case admin.EvictAll(tenant, pinned):
                chosen = blocks_of_all(slots) if tenant is None else blocks_of_tenant(slots, tenant)
                return self._evict(chosen, pinned=pinned)
            case admin.SetDraining(draining):
                self.draining = draining
                self._tell_readers()
                return None
            case admin.NotePhases(times):
                if not all(self.phases.add(each) for each in times):
                    raise FrameError("NotePhases with a phase that is none, or broken counts")
                return None
            case admin.AskReport():
                return self.report()
            case _:
                raise FrameError(f"{type(message).__name__} is not for a store node")

    def _evict(self, chosen: Iterable[SlotId], *, pinned: bool) -> admin.Counted:
        self._core.room.look()  # what readers hold by themselves counts as held
        return admin.Counted(evict(self._core.slots, self._core.pins, chosen, pinned=pinned))

    def stat(self, stat: StoreStat) -> StoreStat:
        return stat if self._ssd is None else replace(stat, ssd=self._ssd.stat())

    def report(self) -> admin.StoreReport:
        pins = self._core.pins
        return admin.StoreReport(
            block_bytes=self._arena.geometry.block_bytes,
            draining=self.draining,
            stat=self.stat(self._core.stat()),
            pins={"soft": pins.soft_count, "hard": len(pins.hard), "hard_max": pins.hard_max},
            tenants=tuple(self._core.slots.order.accounts.uses()),
            counters={**self.counters, **self._vitals.figures()},
            phases=self.phases.times(),
            epoch=self.epoch,
            masters=self.masters,
        )

    async def audit(self, blocks_max: int | None) -> admin.AuditReport:
        """Raises CapacityError while another one is under way."""
        if self._auditing:
            raise CapacityError(
                "an audit of this store is under way already; wait for its end",
                retry_after_ms=RETRY_AFTER_MS,
            )
        self._auditing = True
        try:
            return await self._audit(blocks_max)
        finally:
            self._auditing = False

    async def _audit(self, blocks_max: int | None) -> admin.AuditReport:
        self._settle()
        findings = list(islice(misfits(self._core), FINDINGS_MAX))
        slot_count = self._core.slots.slot_count
        verified = 0
        step = max(1, min(PIECE_SLOTS, PIECE_BYTES // self._arena.geometry.block_bytes))
        for first in range(0, slot_count, step):
            self._settle()
            for slot in map(SlotId, range(first, min(first + step, slot_count))):
                findings += self._wrong_header(slot)
                if self._is_complete(slot) and (blocks_max is None or verified < blocks_max):
                    verified += 1
                    findings += self._wrong_bytes(slot)
            if len(findings) >= FINDINGS_MAX:
                break
            await asyncio.sleep(0)
        return admin.AuditReport(slot_count, verified, tuple(findings[:FINDINGS_MAX]))

    def _pin(self, message: admin.PinPrefix) -> int:
        lifetime_ms, until_ns = message.lifetime_ms, FOREVER_NS
        if lifetime_ms is not None:
            if not 0 < lifetime_ms <= LIFETIME_MS_MAX:
                raise FrameError(
                    f"a pin of {lifetime_ms} ms; it must be between 1 and {LIFETIME_MS_MAX}"
                )
            until_ns = self.clock() + lifetime_ms * MS
        return self._core.pins.pin(message.keys, hard=message.hard, until_ns=until_ns)

    def _is_complete(self, slot: SlotId) -> bool:
        return self._core.slots.state(slot) in (SlotState.COMMITTED, SlotState.PRIVATE)

    def _wrong_header(self, slot: SlotId) -> list[str]:
        record, header = self._core.slots[slot], self._arena.header(slot)
        said = header.generation, header.state, header.key, header.checksum
        known = record.generation, record.state, record.key, record.checksum
        if said == known:
            return []
        return [f"the header of slot {slot} says {said}, the node's books say {known}"]

    def _wrong_bytes(self, slot: SlotId) -> list[str]:
        record = self._core.slots[slot]
        if block_checksum(record.key, self._arena.payload(slot)) == record.checksum:
            return []
        name = "without a key" if record.key is None else record.key.hex()
        return [f"slot {slot}: the bytes of block {name} fail their checksum"]
