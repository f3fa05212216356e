"""All workers that the router knows, by id and in arrays; and where blocks are.

What a choice compares (when a worker is free, how fast it is, what room it has) stands in arrays
with one element per worker, its *slot*, so that the best of a thousand is found in microseconds.
What changes about a worker is told to ``changed``; before anybody reads the arrays, ``settle``
rewrites the elements of those it was told of, once however much happened to them.
"""

import heapq
import math
from bisect import insort
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pdserve.clock import MS
from pdserve.ids import WorkerId
from pdserve.messages import Address, Hello, Report, Role
from pdserve.router.costs import Correction, CostModel
from pdserve.router.prefix_index import Hits, PrefixIndex
from pdserve.router.slot_arrays import Floats, Largest, Openings
from pdserve.router.worker import Worker
from pdserve.router_config import RouterConfig

LEAD_NS: Final = 10 * MS
"""How long before it is done with what it computes a worker is sent more: the way there, and the
error of a prediction."""

EXPLAINED_WORKERS_MAX: Final = 16
"""With more workers a choice does not tell the prices of the next best ones."""

SLOTS_GROW = 16

_ARRAYS = ("start_ns", "slow", "room", "step_ns", "streams", "hands_off")


class Fleet:
    """All workers, by id and by slot; and, through the index, where blocks are."""

    def __init__(
        self,
        settings: RouterConfig,
        costs: CostModel,
        room_blocks: Callable[[Worker], int] | None = None,
    ) -> None:
        """``room_blocks``: what a new stream may take at a worker; None: what is free there."""
        self.costs = costs
        self._looks_ahead = room_blocks is not None
        self._room_blocks = room_blocks or (lambda worker: worker.room_blocks)
        self.index = PrefixIndex()
        self.correction = self._new_correction()  # of all prefill workers together
        self.prefill_bits = 0  # bit set of the slots that may be sent prompts
        self.prefill_count = 0  # of them
        self._changed: list[Worker] = []  # their elements are to be rewritten
        self._openings = Openings()
        self._lasts = Largest()  # keys of last prompts in line that may yield
        self.heard_all_ns = 0  # since then everybody has been heard of, at least
        self._mode = settings.mode
        self.aggregated = settings.mode == "aggregated"
        self.shares = settings.mode != "disaggregated"  # some workers do both
        self.mixed = False  # more than one namespace
        self.is_placed = False  # somebody says where it is
        self.fetches = False  # everybody fetches from other hosts' stores what that is sooner for
        self.far_ratio = settings.far_ratio
        self.distances: dict[int, Floats] = {}
        """Of all slots from a slot; ``pairing`` writes them, and they are forgotten when somebody
        comes or goes."""

        self._workers: dict[WorkerId, Worker] = {}
        self._slots: list[Worker | None] = []
        self._free: list[int] = []  # heap of slots without a worker
        self._by_role: dict[Role, list[Worker]] = {role: [] for role in Role}
        self._ordered: list[Worker] = []
        self.largest: Hello | None = None  # the largest pool of those that decode
        self.largest_tokens = 0  # that fit into it
        self.block_tokens = 1  # they agree within a cluster; 1 until somebody has been there to say
        self.start_ns: Floats = np.empty(0)  # when it would begin with something new
        self.slow: Floats = np.empty(0)  # than the cost model says; infinite: it takes no prompts
        self.room: Floats = np.empty(0)  # blocks a new stream may take
        self.step_ns: Floats = np.empty(0)  # predicted with one stream more that is handed to it
        self.streams: Floats = np.empty(0)  # that a prompt here would hold up
        self.hands_off: Floats = np.empty(0)  # 1 where prompts are handed to another worker

    def _new_correction(self) -> Correction:
        return Correction(bounded=self.costs.origin != "believed")

    # ── who is there ─────────────────────────────────────────────────────────────────────────────

    def get(self, worker: WorkerId | None) -> Worker | None:
        return None if worker is None else self._workers.get(worker)

    def at(self, slot: int) -> Worker:
        worker = self._slots[slot]
        assert worker is not None, f"no worker at slot {slot}"
        return worker

    def of(self, role: Role) -> Sequence[Worker]:
        """In the order of their ids, so that replayed traces stay identical."""
        return self._by_role[role]

    def all(self) -> Sequence[Worker]:
        return self._ordered

    @property
    def is_explained(self) -> bool:
        """Whether there are others to choose from, and few enough to tell people of."""
        return 1 < len(self._ordered) <= EXPLAINED_WORKERS_MAX

    def add(self, hello: Hello, now_ns: int) -> Worker:
        assert hello.worker not in self._workers, f"{hello.worker} is there already"
        slot = self._free_slot()
        decodes = self._mode == "auto" or hello.role is Role.DECODE
        prefilling = Role.DECODE if self.aggregated else Role.PREFILL
        prefills = self._mode == "auto" or hello.role is prefilling
        worker = Worker(
            hello=hello,
            slot=slot,
            last_heard_ns=now_ns,
            correction=self._new_correction(),
            free_blocks=hello.block_count,
            prefills=prefills,
            decodes=decodes,
            chunk_ns=self.costs.prefill_ns(hello.chunk_tokens),
            free_at_ns=now_ns,
        )
        self._slots[slot] = worker
        self._workers[worker.id] = worker
        if prefills:
            self.prefill_bits |= 1 << slot
            self.prefill_count += 1
            self.hands_off[slot] = hello.role is Role.PREFILL
        self.index.join(slot, hello.store_id)
        insort(self._ordered, worker, key=_id_of)
        insort(self._by_role[hello.role], worker, key=_id_of)
        others = (self._ordered[0], self._ordered[-1])  # unless it is alone, one is another
        self.mixed |= any(other.hello.namespace != hello.namespace for other in others)
        self.is_placed |= bool(hello.place)
        self.fetches = hello.fetches and (self.fetches or len(self._ordered) == 1)
        self.distances.clear()
        self.block_tokens = hello.block_tokens
        self._recount_prefilling(worker)
        if hello.role is Role.DECODE:
            self._set_largest(max(self.largest or hello, hello, key=_pool_tokens))
        self.changed(worker)
        if len(self._ordered) == 1:
            self.heard_all_ns = now_ns
        return worker

    def remove(self, worker: Worker) -> None:
        slot = worker.slot
        del self._workers[worker.id]
        self._slots[slot] = None
        heapq.heappush(self._free, slot)
        self.prefill_bits &= ~(1 << slot)
        self.prefill_count -= worker.prefills
        self._ordered.remove(worker)
        self._by_role[worker.hello.role].remove(worker)
        self.index.leave(slot, worker.hello.store_id)
        if worker.is_changed:
            self._changed.remove(worker)
        self._clear(slot)
        self._recount_prefilling(worker)
        self._recount()

    def assign(
        self,
        worker: Worker,
        role: Role,
        *,
        prefills: bool,
        decodes: bool,
        stands_in: bool = False,
    ) -> None:
        """From now on it does this. What it has of its former work is the caller's to move."""
        slot = worker.slot
        self._by_role[worker.hello.role].remove(worker)
        worker.hello = replace(worker.hello, role=role)
        insort(self._by_role[role], worker, key=_id_of)
        self.prefill_count += int(prefills) - int(worker.prefills)
        self.prefill_bits &= ~(1 << slot)
        if prefills:
            self.prefill_bits |= 1 << slot
        self.index.version += 1  # of whom it is asked has changed
        if prefills != worker.prefills:
            self.index.forget(slot)  # it did not listen, or will not
        worker.prefills, worker.decodes, worker.stands_in = prefills, decodes, stands_in
        self._clear(slot)
        does_both = stands_in or self.aggregated
        self.hands_off[slot] = prefills and role is Role.PREFILL and not does_both
        for other in self._ordered:  # when others are open depends on whether there are several
            self.changed(other)
        self._recount()

    def silent(self, limit_ns: int, now_ns: int) -> list[Worker]:
        """Those that have not been heard of for so long. Looks at all of them, once in so long."""
        if self.heard_all_ns + limit_ns > now_ns:
            return []
        silent = [w for w in self._ordered if w.last_heard_ns + limit_ns <= now_ns]
        self.heard_all_ns = min(
            (w.last_heard_ns for w in self._ordered if w not in silent), default=now_ns
        )
        return silent

    def excuse(self, elapsed_ns: int) -> None:
        """That much of everybody's silence is not their own."""
        for worker in self._ordered:
            worker.last_heard_ns += elapsed_ns
        self.heard_all_ns += elapsed_ns

    def _recount_prefilling(self, worker: Worker) -> None:
        """It came or went; when others are open depends on whether there are several."""
        if worker.prefills and self.prefill_count <= 2:
            for other in self._ordered:
                self.changed(other)

    def _recount(self) -> None:
        decoding = [worker.hello for worker in self._by_role[Role.DECODE] if worker.decodes]
        somebody_stands_in = any(worker.stands_in for worker in self._ordered)
        self.shares = self._mode != "disaggregated" or somebody_stands_in
        self.mixed = len({worker.hello.namespace for worker in self._ordered}) > 1
        self.is_placed = any(worker.hello.place for worker in self._ordered)
        self.fetches = all(worker.hello.fetches for worker in self._ordered)
        self.distances.clear()
        self._set_largest(max(decoding, key=_pool_tokens, default=None))

    def _set_largest(self, largest: Hello | None) -> None:
        self.largest = largest
        self.largest_tokens = 0 if largest is None else _pool_tokens(largest)

    def _free_slot(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        first = len(self._slots)
        self._slots += [None] * max(SLOTS_GROW, first)
        for name in _ARRAYS:
            setattr(self, name, np.resize(getattr(self, name), len(self._slots)))
        self._openings.grow(len(self._slots))
        self._lasts.grow(len(self._slots))
        for slot in range(first, len(self._slots)):
            self._clear(slot)
        self._free = list(range(first + 1, len(self._slots)))
        return first

    def _clear(self, slot: int) -> None:
        self.start_ns[slot] = 1.0
        self.slow[slot] = self.step_ns[slot] = math.inf
        self.room[slot] = -1
        self.streams[slot] = self.hands_off[slot] = 0.0
        self._openings.enter(slot, math.inf)
        self._lasts.enter(slot, -math.inf)

    # ── what changes ─────────────────────────────────────────────────────────────────────────────

    def apply(self, report: Report, worker: Worker) -> None:
        """Take over what a report says of the worker itself."""
        if worker.next_sequence is not None and worker.next_sequence != report.sequence:
            self.index.forget(worker.slot)  # deltas were lost
        worker.next_sequence = report.sequence + 1
        worker.draining = report.draining
        worker.running, worker.waiting = report.running, report.waiting
        worker.free_blocks = report.free_blocks
        worker.counters = report.counters
        if worker.prefills and (report.blocks_added or report.blocks_removed):
            self.index.update(worker.slot, report.blocks_added, report.blocks_removed)
        if report.store_anew:
            self.index.forget(worker.hello.store_id)
        if report.store_added or report.store_removed:
            self.index.update(worker.hello.store_id, report.store_added, report.store_removed)

    def changed(self, worker: Worker) -> None:
        """What the arrays say of it is out of date."""
        if not worker.is_changed:
            worker.is_changed = True
            self._changed.append(worker)

    def settle(self) -> None:
        """Enter into the arrays what has changed."""
        while self._changed:
            worker = self._changed.pop()
            worker.is_changed = False
            self._rewrite(worker)

    def _rewrite(self, worker: Worker) -> None:
        slot = worker.slot
        if worker.prefills:
            self.start_ns[slot] = float(worker.free_at_ns)
            opens_ns = self._opens_ns(worker) if worker.has_prefill_room else math.inf
            self._openings.enter(slot, opens_ns)
            self.slow[slot] = math.inf if worker.draining else worker.correction.factor
        if worker.decodes:
            streams = len(worker.streams)
            self.room[slot] = self._room_blocks(worker)
            self.streams[slot] = streams
            if worker.hello.role is not Role.PREFILL or worker.stands_in:
                self.step_ns[slot] = self.costs.decode.step_ns(streams + 1, worker.context_tokens)

    def _opens_ns(self, worker: Worker) -> float:
        """Shortly before it is done with what it computes now: what was sent earlier would be bound
        to this worker though others may be free sooner. Where there are no others, at once."""
        if not worker.prompts or self.prefill_count == 1:
            return 0.0
        if len(worker.prompts) == 1:
            return worker.free_at_ns - LEAD_NS
        waiting_ns = sum([held.work_ns for held in islice(worker.prompts.values(), 1, None)])
        return worker.free_at_ns - waiting_ns * worker.correction.factor - LEAD_NS

    def rank_last(self, worker: Worker, key_ns: float) -> None:
        """Enter the key of the last prompt in line there, if it may yield; else −inf."""
        self._lasts.enter(worker.slot, key_ns)

    def last_key_ns(self, slot: int) -> float:
        key_ns: float = self._lasts.values.item(slot)
        return key_ns

    def last_keys_ns(self) -> Floats:
        """A copy of all of them."""
        return self._lasts.values.copy()

    def last_of_all(self) -> int | None:
        """The slot with the largest of those keys; None: nobody may yield."""
        return self._lasts.slot()

    @property
    def prefill_end(self) -> int:
        """Behind the last slot that prefills: what is asked of those alone looks no further."""
        return self.prefill_bits.bit_length()

    @property
    def open_ns(self) -> Floats:
        """When each slot takes a prompt, as far as it is settled; infinite: it has no room."""
        return self._openings.opens_ns

    def soonest_open_ns(self) -> float:
        """When the first worker takes another prompt."""
        self.settle()
        return self._openings.soonest_ns()

    def next_soonest_open_ns(self) -> float:
        """When the second one does, counting equal ones."""
        self.settle()
        return self._openings.next_ns()

    def only_open_slot(self, instant_ns: float) -> int | None:
        """Of the one that takes another prompt by then; None: several do. One must."""
        self.settle()
        return self._openings.only_slot(instant_ns)

    def open_slots(self, instant_ns: float) -> NDArray[np.intp]:
        """Of those who take another prompt by then, ascending."""
        self.settle()
        return (self.open_ns[: self.prefill_end] <= instant_ns).nonzero()[0]

    def is_another_open_by(self, instant_ns: float, *, but: int) -> bool:
        """Whether a worker takes another prompt by then, the one at a slot left aside."""
        self.settle()
        return self._openings.is_another(instant_ns, but=but)

    # ── predictions ──────────────────────────────────────────────────────────────────────────────

    def work_ns(self, uncached_tokens: int, cached_tokens: int) -> int:
        """A prefill at a worker of average speed."""
        predicted_ns = self.costs.prefill_ns(uncached_tokens, cached_tokens)
        return round(predicted_ns * self.correction.factor)

    def hits(self, keys: Sequence[Hashable]) -> Hits:
        """Leading blocks that the workers which prefill can use."""
        return self.index.hits(keys, self.prefill_bits)

    def open_bits(self, now_ns: int) -> int:
        """Bit set of the slots that take a prompt now."""
        self.settle()
        return self._openings.bits(now_ns)

    def serving_count(self) -> int:
        """Workers that begin prompts now: none where all of them leave, and none while nobody takes
        streams, since a prompt is dispatched together with its way on. Linear."""
        staying = [worker for worker in self._ordered if not worker.draining]
        if not any(worker.decodes for worker in staying):
            return 0
        return sum(worker.prefills for worker in staying)

    def has_store(self, store: Address) -> bool:
        """Whether any worker still speaks for that store node's host."""
        return any(worker.hello.store == store for worker in self._workers.values())

    def check(self) -> None:
        """Assert that arrays and workers agree. Linear; for tests."""
        self.settle()
        self._openings.check()
        self._lasts.check()
        for slot, worker in enumerate(self._slots):
            closed = worker is None or not worker.has_prefill_room
            assert (self.open_ns[slot] == math.inf) == closed, f"slot {slot}"
            room = -1 if worker is None else worker.room_blocks
            looks_ahead = self._looks_ahead and self.room[slot] <= room
            assert looks_ahead or self.room[slot] == room, f"slot {slot}"
        assert self.prefill_count == self.prefill_bits.bit_count()
        decoding = (worker for worker in self._by_role[Role.DECODE] if worker.decodes)
        pools = [_pool_tokens(worker.hello) for worker in decoding]
        assert self.largest_tokens == max(pools, default=0)


def _id_of(worker: Worker) -> WorkerId:
    return worker.id


def _pool_tokens(hello: Hello) -> int:
    return hello.block_count * hello.block_tokens
