"""The disk below an arena: what is used again goes down, what is asked for comes up.

What goes down is ``SsdWrite``'s to say: what a prompt finds (its *second touch*: most blocks are
used once, and would only wear the disk), what is committed, or what is evicted. Parents go before
children, several blocks in one write. The queue is short, and what does not fit is dropped: a disk
that is slow costs hits and never time. A prompt whose prefix goes on where the arena's ends waits
for the rest to come up; it waits in a short line and for a bounded time, and then computes. How
long that is likely to take the tier learns from each fetch, and says to who asks (``quote``).

One thread writes, and a few read. A disk that fails is left alone for a while (``Health``), for
reading and for writing apart: one that is full can still be read. Books and slots are
``StoreCore``'s: the tier is an owner like any other, so what is read or filled here is pinned or
reserved as long.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from pdserve.config import SsdWrite
from pdserve.errors import BlockMissing, CapacityError
from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore.answers import ClaimGrant, PrefixQuote
from pdserve.kvstore.arena import Arena, block_checksum
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.path_speed import PathCost, PathSpeed
from pdserve.kvstore.slot_states import Evicted
from pdserve.kvstore.ssd.disk_file import aligned_buffer
from pdserve.kvstore.ssd.health import Health
from pdserve.kvstore.ssd.log import Block, SsdLog

_log = logging.getLogger(__name__)
T = TypeVar("T")

WRITES_WAITING_MAX = 32
"""Prefixes, or groups of evicted blocks, that wait to go down."""

EVICTED_BYTES_MAX = 64 << 20
"""Copies of evicted blocks that wait to go down; their slots have been given away."""

JOBS_AT_ONCE = 2
"""Of those, how many are taken up: while one is written the next is made ready."""

FETCHES_WAITING_MAX = 16
FETCH_S_MAX = 2.0
"""How long a prompt waits for the disk, its place in line included."""

READERS = 4
"""Reads under way at once, of up to ``BATCH_BYTES_MAX`` each: while one is checked the disk has
others."""

PIECE_BATCHES = 8
"""Writes whose blocks go down or come up in one go: a thread is slow to wake on a busy machine.
Between two pieces somebody looks at the time."""

FINISH_S_MAX = 5.0
"""How long a node that ends still writes."""

WRITE_FAILURES_MAX = 1
READ_FAILURES_MAX = 3
"""Pieces in a row of which a block could not be read; one alone is that block's misfortune."""

BELIEVED = PathCost(fixed_s=0.002, bytes_per_s=1e9)
"""Of a disk that nothing has been read from."""

COUNTERS = (
    "written",  # blocks that went down
    "read",  # that came up
    "dropped",  # prefixes that did not go down because the disk was slow, full or failing
    "timeouts",  # prompts that the disk took too long for
    "pauses",  # times that the disk was left alone for a while
    "faults",  # errors that nobody expected
)

_Job = tuple[BlockKey, ...] | list[Block]  # a prefix in the arena, or copies of evicted blocks


class SsdTier:
    def __init__(
        self, core: StoreCore, arena: Arena, log: SsdLog, *, policy: SsdWrite = "second_touch"
    ) -> None:
        """``core`` counts what is in ``log`` as stored."""
        self.settle: Callable[[], None] = lambda: None
        """Carries out what the core's books have changed; the server's, once there is one."""

        self.policy = policy
        self._core = core
        self._arena = arena
        self._log = log
        self._owner = core.connect("ssd")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ssd-write")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="ssd-read")
        self._to_write: asyncio.Queue[_Job] = asyncio.Queue(WRITES_WAITING_MAX)
        self._queued: Counter[BlockKey] = Counter()  # of the prefixes that wait
        self._evicted_bytes = 0
        self._fetching = asyncio.Lock()
        self._waiting_bytes: list[int] = []  # what each prompt in line waits for
        self._speed = PathSpeed(BELIEVED)
        self._writing, self._reading = Health(WRITE_FAILURES_MAX), Health(READ_FAILURES_MAX)
        self.counters = Counter(dict.fromkeys(COUNTERS, 0))

    def stat(self) -> dict[str, int]:
        cost, counts = self._speed.cost, self._log.counts
        return {
            "blocks": len(self._log),
            **self.counters,
            "wrong": counts.wrong,
            "failed": counts.failed,
            "is_direct": int(self._log.is_direct),
            "fetch_fixed_us": round(cost.fixed_s * 1e6),
            "fetch_bytes_per_s": round(cost.bytes_per_s),
        }

    # ── down ─────────────────────────────────────────────────────────────────────────────────────

    def found(self, keys: Sequence[BlockKey]) -> None:
        """A prompt found these blocks in the arena."""
        if self.policy == "second_touch":
            self._line_up(keys)

    def stored(self, keys: Sequence[BlockKey]) -> None:
        """These blocks, from a chain's first on, have been committed."""
        if self.policy == "write_through":
            self._line_up(keys)

    def evicted(self, evicted: Sequence[Evicted]) -> None:
        """These slots have been given away, and nobody has been told yet: the blocks that were in
        them are still there, and are copied."""
        if self.policy != "on_evict":
            return
        wanted = [each for each in evicted if each.key not in self._log]
        if not wanted or not self._is_usable(self._writing):
            return
        kind = self._log.kind
        copies_max = (EVICTED_BYTES_MAX - self._evicted_bytes) // kind.padded_bytes
        # Those that went last are the parents of the others: without them these are of no use.
        kept = list(reversed(wanted))[: max(0, copies_max)]
        if len(kept) < len(wanted) or self._to_write.full():
            self.counters["dropped"] += 1
        if not kept or self._to_write.full():
            return
        buffer = aligned_buffer(len(kept) * kind.padded_bytes)
        blocks = []
        for index, each in enumerate(kept):
            room = buffer[index * kind.padded_bytes : (index + 1) * kind.padded_bytes]
            self._arena.read(each.slot, room[: kind.block_bytes])
            blocks.append(Block(each.key, each.checksum, room))
        self._evicted_bytes += len(buffer)
        self._to_write.put_nowait(blocks)

    def _line_up(self, keys: Sequence[BlockKey]) -> None:
        log, queued = self._log, self._queued
        if all(key in log or key in queued for key in keys):
            return
        try:
            self._to_write.put_nowait(tuple(keys))
        except asyncio.QueueFull:
            self.counters["dropped"] += 1
        else:
            queued.update(keys)

    async def run(self) -> None:
        """Write what waits, until cancelled."""
        await asyncio.gather(*(self._write_jobs() for _ in range(JOBS_AT_ONCE)))

    async def _write_jobs(self) -> None:
        """Whatever goes wrong, it goes on."""
        while True:
            job = await self._to_write.get()
            try:
                if self._is_usable(self._writing):
                    await self._write(job)
                    self._writing.succeeded()
                else:
                    self.counters["dropped"] += 1
            except CapacityError as error:
                self._pause(self._writing, "blocks stay off the disk", error)
            except Exception as error:
                _log.exception("the disk's writer met what it does not know")
                self.counters["faults"] += 1
                self._pause(self._writing, "blocks stay off the disk", error)
            finally:
                self._forget_job(job)
                self._to_write.task_done()

    async def finish(self) -> None:
        """What waits goes down, as far as there is time; for an orderly end."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._to_write.join(), FINISH_S_MAX)

    def _forget_job(self, job: _Job) -> None:
        if isinstance(job, tuple):
            self._queued -= Counter(job)
        else:
            self._evicted_bytes -= len(job) * self._log.kind.padded_bytes

    async def _write(self, job: _Job) -> None:
        if isinstance(job, list):
            # Copied while nobody could write there; this holds if that was ever wrong.
            size = self._log.kind.block_bytes
            whole = [b for b in job if block_checksum(b.key, b.room[:size]) == b.checksum]
            try:
                await self._append(whole)
            finally:
                there = [block.key for block in whole if block.key in self._log]
                self._core.lower_tier_changed(there, has_them=True)
            return
        claim = self._core.hold(self._owner, job)
        try:
            blocks = [
                Block(job[index], self._checksum_of(claim, index), self._arena.room(slot))
                for index, slot in enumerate(claim.slots)
                if job[index] not in self._log
            ]
            await self._append(blocks)
        except BlockMissing as error:
            _log.info("a prefix stays off the disk: %s", error)
        finally:
            self._core.release(self._owner, claim.claim)
            self.settle()

    def _checksum_of(self, claim: ClaimGrant, index: int) -> int:
        return self._core.claimed(self._owner, claim.claim, index)[1].checksum

    async def _append(self, blocks: Sequence[Block]) -> None:
        piece_blocks = PIECE_BATCHES * self._log.kind.batch_blocks
        try:
            for start in range(0, len(blocks), piece_blocks):
                piece = blocks[start : start + piece_blocks]
                await self._do(self._writer, [partial(self._log.append, piece)])
                self.counters["written"] += len(piece)
        finally:
            self._core.lower_tier_changed(self._log.take_gone(), has_them=False)

    # ── up ───────────────────────────────────────────────────────────────────────────────────────

    def quote(self, keys: Sequence[BlockKey]) -> PrefixQuote:
        """How many leading blocks the arena has, how many it has with the disk, and what it takes
        to bring those up: what waits in line before them included."""
        in_arena = stored = self._core.prefix_count(keys)
        if self._has_place():
            while stored < len(keys) and keys[stored] in self._log:
                stored += 1
        cost = self._speed.cost
        line_s = sum(map(cost.time_s, self._waiting_bytes))
        return PrefixQuote(in_arena, stored, line_s + cost.fixed_s, cost.bytes_per_s)

    def has_more(self, keys: Sequence[BlockKey], *, ahead: bool = False) -> bool:
        """Whether the prefix goes on here where it ends in the arena, and somebody may wait for it.
        ``ahead``: nobody does yet, so half of the line stays free for those who will."""
        present = self._core.prefix_count(keys)
        below = present < len(keys) and keys[present] in self._log
        return below and self._has_place(ahead=ahead)

    async def fetch(self, keys: Sequence[BlockKey], tenant: str = "") -> None:
        """Bring up what there is of a tenant's prefix, as far as there is room and time."""
        missing = len(keys) - self._core.prefix_count(keys)
        wanted_bytes = missing * self._log.kind.block_bytes
        self._waiting_bytes.append(wanted_bytes)
        try:
            async with asyncio.timeout(FETCH_S_MAX), self._fetching:
                while await self._fetch_some(keys, tenant):
                    self.settle()
        except TimeoutError:
            self.counters["timeouts"] += 1
        except Exception as error:
            _log.exception("the disk's reader met what it does not know")
            self.counters["faults"] += 1
            self._pause(self._reading, "nothing is read from the disk", error)
        finally:
            self._waiting_bytes.remove(wanted_bytes)
            self.settle()

    def _has_place(self, *, ahead: bool = False) -> bool:
        waiting_max = FETCHES_WAITING_MAX // 2 if ahead else FETCHES_WAITING_MAX
        return len(self._waiting_bytes) < waiting_max and self._is_usable(self._reading)

    async def _fetch_some(self, keys: Sequence[BlockKey], tenant: str) -> bool:
        """The next blocks; whether there may be more."""
        if not self._is_usable(self._reading):
            return False
        present = end = self._core.prefix_count(keys)
        piece_blocks = PIECE_BATCHES * self._log.kind.batch_blocks
        while end < min(len(keys), present + piece_blocks) and keys[end] in self._log:
            end += 1
        if end == present:
            return False
        grant = self._core.reserve(
            self._owner, keys[:end], present, tenant=tenant, between_tiers=True
        )
        if grant.write == 0:
            return False
        try:
            self.settle()  # before what was evicted for it is written over
            wanted = keys[grant.first_index : grant.first_index + len(grant.slots)]
            checksums = await self._read(wanted, grant.slots)
            whole = checksums.index(None) if None in checksums else len(checksums)
            if whole < len(wanted):  # what is before is to be had, by the next try
                self._core.lower_tier_changed(self._log.take_gone(), has_them=False)
                reason = f"{whole} of {len(wanted)} blocks came"
                self._pause(self._reading, "nothing is read from the disk", reason)
                return True
            self._reading.succeeded()
            for position, checksum in enumerate(checksums):
                assert checksum is not None
                self._core.filled(self._owner, grant.write, position, checksum)
            self._core.commit(self._owner, grant.write)
            self.counters["read"] += len(wanted)
        finally:
            self._core.abandon(self._owner, grant.write)  # of a commit nothing is left
        return True

    async def _read(self, keys: Sequence[BlockKey], slots: Sequence[SlotId]) -> list[int | None]:
        """Into the slots; the checksums, None for what is not to be had."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        outs = [self._arena.room(slot) for slot in slots]
        parts = parts_of(self._log.runs(keys), READERS)
        starts = [sum(parts[:index]) for index in range(len(parts))]
        reads = [
            partial(self._log.read, keys[at : at + count], outs[at : at + count])
            for at, count in zip(starts, parts, strict=True)
        ]
        checksums = [each for part in await self._do(self._readers, reads) for each in part]
        if None not in checksums:
            self._speed.observe(len(keys) * self._log.kind.block_bytes, loop.time() - began_s)
        return checksums

    # ── the threads ──────────────────────────────────────────────────────────────────────────────

    async def _do(self, threads: ThreadPoolExecutor, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Let threads do it. Who is cancelled waits for their end: they have slots in hand."""
        loop = asyncio.get_running_loop()
        doing = [loop.run_in_executor(threads, call) for call in calls]
        cancelled: asyncio.CancelledError | None = None
        while not all(future.done() for future in doing):
            try:
                await asyncio.wait(doing)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled
        return [future.result() for future in doing]

    def _is_usable(self, health: Health) -> bool:
        return health.is_usable(asyncio.get_running_loop().time())

    def _pause(self, health: Health, what: str, reason: object) -> None:
        pause_s = health.failed(asyncio.get_running_loop().time())
        if pause_s is not None:
            self.counters["pauses"] += 1
            _log.warning("%s for %g s: %s", what, pause_s, reason)

    def close(self) -> None:
        """When nobody runs or fetches any more."""
        self._writer.shutdown()
        self._readers.shutdown()
        self._log.close()


def parts_of(runs: Sequence[int], part_count: int) -> list[int]:
    """Whole runs gathered into at most ``part_count`` parts of about one size, in order."""
    goal = -(-sum(runs) // part_count)
    parts: list[int] = []
    for run in runs:
        if parts and (parts[-1] + run <= goal or len(parts) == part_count):
            parts[-1] += run
        else:
            parts.append(run)
    return parts
