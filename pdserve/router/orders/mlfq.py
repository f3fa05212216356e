"""Feedback queues: plain MLFQ, FastServe as published, and FastServe as its authors released it.

Level 0 is served first, and a level in the order of its places. Each level has a *quantum*, twice
that of the level before. Work is charged as chunks are computed; who has used up the quantum of its
level is demoted, and stands at the end of the line there. Who runs yields at a chunk boundary to
those of better levels, and, once demoted, to those who stood in its new level already.

*Plain* MLFQ knows nothing of lengths: everybody enters level 0 and falls one level at a time.

*FastServe* skips: a request joins the level whose quantum covers its first iteration, which here is
its prefill. So it is demoted only where the prediction was wrong, or after a promotion, and then at
once to the level whose quantum covers its next iteration: what is left of the prefill. Who has
waited ``starvation_ns`` since it last ran is promoted to level 0, with a fresh account.

*As released* it differs from the paper in ways that a prefill queue shows too (``Defects``).

An iteration of the engine is one chunk here, the finest boundary at which anybody can yield; the
paper's is a whole prefill, so this is FastServe with more rights to preempt than it was given.

Sources: Corbató et al., 1962 (MLFQ); Wu et al., arXiv:2305.05920 and its code, LLMServe/FastServe.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice

from pdserve.clock import MS, US, S
from pdserve.ids import RequestId
from pdserve.router.costs import CostModel
from pdserve.router.entry import Entry
from pdserve.router.orders.base import Order
from pdserve.router.orders.level_lines import LevelHeap, LevelLines, LevelLists
from pdserve.router_config import RouterConfig

RELEASED_FIRST_QUANTUM_NS = 10 * MS
RELEASED_STARVATION_NS = 3 * S
RELEASED_SWEEP_EVERY = 1000
"""Iterations between two looks for who starves."""

LEVEL_KEY_NS = 10**12
"""Between the keys of two levels: more than any place, and than any margin of yielding."""

RELEASED_LEVEL_COUNT = 32
"""The released code has no last level; the quantum of this one is 248 days."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defects:
    """What the released code does and the paper does not, as far as a prefill queue has it.

    D11 (admission stops silently when a tenth of the host's blocks is left) and D12 (one engine, no
    tenants, no deadlines) are not the order's: they are about what stands around it.
    """

    sweeps: bool = False
    """D1: starvation is looked for every 1,000 iterations only."""

    never_ran_is_starved: bool = False
    """D2: who has never run counts as waiting for ever, so each sweep promotes all of them."""

    reverses: bool = False
    """D3: a sweep puts the starved at the front one by one: the last is first."""

    keeps_account: bool = False
    """D4: a promoted request is charged for what it used before, and demoted at once."""

    tiny_quantum: bool = False
    """D5: a first quantum of 10 ms, less than an iteration takes: levels count iterations."""

    lists: bool = False
    """D6: levels are lists, popped and filled at the front: linear."""

    one_level: bool = False
    """D7: demotion by one level, whatever the next iteration takes."""

    ignores_cache: bool = False
    """D8: the level is that of the prompt's length, however much of it is cached."""

    returns_to_front: bool = False
    """D9: whoever comes back goes to the front of its level, so that nobody rotates."""

    head_of_line: bool = False
    """D10: where the first does not fit, nobody behind it is looked at."""

    @staticmethod
    def all() -> "Defects":
        return Defects(**{field.name: True for field in fields(Defects)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    first_quantum_ns: int
    level_count: int
    skips: bool
    """Whether a request joins the level that covers it, and not level 0."""

    starvation_ns: int | None
    """Who waited so long since it ran is promoted; None: nobody is."""

    defects: Defects

    def quantum_ns(self, level: int) -> int:
        return self.first_quantum_ns << level

    def level_of(self, work_ns: int) -> int:
        """The first level whose quantum covers so much work; the last if none does."""
        quanta = -(-work_ns // self.first_quantum_ns)  # ceil
        return min(self.level_count - 1, max(0, quanta - 1).bit_length())


@dataclass(slots=True)
class _Account:
    """What is kept of an entry from its first push until it is forgotten."""

    place: int
    used_us: int = 0  # of the quantum of its level
    ran: bool = False
    settled: bool = False  # it ran or was promoted: its level no longer follows its work
    demoted: bool = False  # since it was dispatched


class FeedbackQueue(Order):
    preempts = True

    def __init__(self, rules: Rules, costs: CostModel) -> None:
        self._rules = rules
        self._defects = rules.defects
        self._costs = costs
        self._lines: LevelLines = LevelLists() if rules.defects.lists else LevelHeap()
        self._accounts: dict[RequestId, _Account] = {}
        self._waiting: OrderedDict[RequestId, Entry] = OrderedDict()
        self._unpromoted: OrderedDict[RequestId, Entry] = OrderedDict()  # longest wait first
        self._counts = [0] * rules.level_count
        self._front_place = 0
        self._back_place = 0
        self._iterations_until_sweep = RELEASED_SWEEP_EVERY

    # ── Order ────────────────────────────────────────────────────────────────────────────────────

    def push(self, entry: Entry, now_ns: int) -> None:
        assert entry.id not in self._waiting, f"{entry.id} waits already"
        account = self._accounts.get(entry.id)
        if account is None:
            account = self._accounts[entry.id] = _Account(self._back())
            entry.level = self._entry_level(entry)
        elif self._defects.returns_to_front:
            account.place = self._front()
        elif account.demoted:
            account.place = self._back()
        account.demoted = False
        self._waiting[entry.id] = entry
        self._unpromoted[entry.id] = entry
        self._enter(entry, account)

    def remove(self, entry: Entry) -> None:
        assert entry.id in self._waiting, f"{entry.id} does not wait"
        del self._waiting[entry.id]
        self._unpromoted.pop(entry.id, None)
        self._leave(entry)

    def refresh(self, entry: Entry, now_ns: int) -> None:
        account = self._accounts[entry.id]
        level = self._entry_level(entry)
        if account.settled or level == entry.level:
            return
        self._move(entry, account, level, self._back())

    def dispatched(self, entry: Entry, now_ns: int) -> None:
        account = self._accounts[entry.id]
        account.ran = account.settled = True
        # A prefill's last chunk is reported as its end, so the dispatch stands for that iteration.
        self._iterations_until_sweep -= 1

    def served(self, entry: Entry, elapsed_us: int, now_ns: int) -> None:
        account = self._accounts[entry.id]
        account.used_us += elapsed_us
        is_last = entry.level == self._rules.level_count - 1
        if not is_last and account.used_us * US > self._rules.quantum_ns(entry.level):
            entry.level += 1
            if not self._defects.one_level:
                entry.level = max(entry.level, self._rules.level_of(entry.work_ns))
            account.used_us = 0
            account.demoted = True
        self._iterations_until_sweep -= 1

    def forget(self, entry: Entry) -> None:
        assert entry.id not in self._waiting, f"{entry.id} waits, it cannot be forgotten"
        self._accounts.pop(entry.id, None)

    def may_stand_aside(self, entry: Entry) -> bool:
        return False

    def ranked(self, now_ns: int) -> Iterator[Entry]:
        """Those that wait; the first alone where D10 looks at no other."""
        if not self._defects.sweeps:
            self._promote_due(now_ns)
        elif self._iterations_until_sweep <= 0:
            self._iterations_until_sweep = RELEASED_SWEEP_EVERY
            self._sweep(now_ns)
        return islice(self._lines, 1 if self._defects.head_of_line else None)

    def key_ns(self, entry: Entry, now_ns: int) -> float:
        account = self._accounts[entry.id]
        place = self._back_place + 1 if account.demoted else account.place
        return entry.level * LEVEL_KEY_NS + place

    def yields(self, running: Entry, waiting: Entry, margin_ns: int, now_ns: int) -> bool:
        """By level; what would be gained is nothing that a feedback queue knows."""
        if running.level != waiting.level:
            return running.level > waiting.level
        return self._accounts[running.id].demoted and not self._defects.returns_to_front

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._waiting

    def lengths(self) -> tuple[int, ...]:
        return tuple(self._counts)

    def check(self) -> None:
        lined = list(self._lines)
        assert {entry.id for entry in lined} == set(self._waiting)
        assert len(lined) == len(self._waiting)
        assert set(self._unpromoted) <= set(self._waiting) <= set(self._accounts)
        keys = [(entry.level, self._accounts[entry.id].place) for entry in lined]
        assert keys == sorted(keys)
        for level, count in enumerate(self._counts):
            assert count == sum(entry.level == level for entry in lined)

    # ── levels and places ────────────────────────────────────────────────────────────────────────

    def _entry_level(self, entry: Entry) -> int:
        if not self._rules.skips:
            return 0
        if self._defects.ignores_cache:
            return self._rules.level_of(self._costs.prefill_ns(entry.total_tokens))
        return self._rules.level_of(entry.work_ns)

    def _front(self) -> int:
        self._front_place -= 1
        return self._front_place

    def _back(self) -> int:
        self._back_place += 1
        return self._back_place

    def _enter(self, entry: Entry, account: _Account) -> None:
        self._lines.push(entry, account.place)
        self._counts[entry.level] += 1

    def _leave(self, entry: Entry) -> None:
        self._lines.remove(entry)
        self._counts[entry.level] -= 1

    def _move(self, entry: Entry, account: _Account, level: int, place: int) -> None:
        self._leave(entry)
        entry.level, account.place = level, place
        self._enter(entry, account)

    # ── starvation ───────────────────────────────────────────────────────────────────────────────

    def _promote_due(self, now_ns: int) -> None:
        """As published: everybody at its instant, who waited longest first."""
        while self._unpromoted:
            entry = next(iter(self._unpromoted.values()))
            if not self._is_starved(entry, now_ns):
                break
            self._promote(entry)

    def _sweep(self, now_ns: int) -> None:
        for entry in [entry for entry in self._lines if self._is_starved(entry, now_ns)]:
            self._promote(entry)

    def _is_starved(self, entry: Entry, now_ns: int) -> bool:
        starvation_ns = self._rules.starvation_ns
        if starvation_ns is None:
            return False
        if self._defects.never_ran_is_starved and not self._accounts[entry.id].ran:
            return True
        return now_ns - entry.queued_at_ns >= starvation_ns

    def _promote(self, entry: Entry) -> None:
        account = self._accounts[entry.id]
        account.settled = True
        if not self._defects.keeps_account:
            account.used_us = 0
        self._unpromoted.pop(entry.id, None)
        if self._defects.reverses:
            self._move(entry, account, 0, self._front())
        elif entry.level > 0:
            self._move(entry, account, 0, self._back())


# ── the three ────────────────────────────────────────────────────────────────────────────────────


def plain(settings: RouterConfig, costs: CostModel) -> FeedbackQueue:
    """``mlfq``. One level at a time is no defect where nothing is known of the next iteration."""
    rules = Rules(
        first_quantum_ns=round(settings.first_quantum_ms * MS),
        level_count=settings.level_count,
        skips=False,
        starvation_ns=None,
        defects=Defects(one_level=True),
    )
    return FeedbackQueue(rules, costs)


def published(settings: RouterConfig, costs: CostModel) -> FeedbackQueue:
    """``fastserve``. The paper leaves the starvation limit to the operator: ours is the instant
    after which we rescue."""
    rules = Rules(
        first_quantum_ns=round(settings.first_quantum_ms * MS),
        level_count=settings.level_count,
        skips=True,
        starvation_ns=round(settings.rescue_after_ms * MS),
        defects=Defects(),
    )
    return FeedbackQueue(rules, costs)


def released(
    settings: RouterConfig, costs: CostModel, defects: Defects | None = None
) -> FeedbackQueue:
    """``fastserve_released``, with all its defects or those given."""
    defects = Defects.all() if defects is None else defects
    first_ns = round(settings.first_quantum_ms * MS)
    rules = Rules(
        first_quantum_ns=RELEASED_FIRST_QUANTUM_NS if defects.tiny_quantum else first_ns,
        level_count=RELEASED_LEVEL_COUNT,
        skips=True,
        starvation_ns=RELEASED_STARVATION_NS,
        defects=defects,
    )
    return FeedbackQueue(rules, costs)
