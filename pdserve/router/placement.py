"""Where a request goes: one price, in time, for every prefill worker; then a decode worker.

    price(w) = wait at w + the least of  prefill of what w has not cached
                                         fetch of what another host has + prefill of the rest
               + hand-off, if another worker is to decode + what its streams lose, if w decodes too

Cache hits, load, speed and interference in one currency, so none of them needs a weight. What a
worker has cached is what its device pool and its host's store have together. What only another
host's store has it fetches where that is sooner than computing it (``engine.restoring``); so the
price is that of what the worker will do. Mooncake's Algorithm 1 decides this by a ratio of prefix
lengths, set by hand; here it follows from what the two take.

Prices are compared over all workers at once, free or not. Where one that is not free yet would do
the request cheaper and sooner (it has the prefix, say), the request is *deferred*: it waits for
that worker; for no longer than it would gain, and never more than ``DEFER_MAX_NS``.

Where hosts say where they are, the hand-off has a length too: see ``pairing``.

Of some requests nothing is decoded (``prompt_tasks``): they need no decode worker, and their route
ends where it begins.

A decode worker must have *room*, in sequences and in blocks, and is chosen by the step time it is
predicted to have with one stream more. Blocks are counted for the tokens a request has now and a
little growth, not for the most it might generate: what does not fit in the end is parked.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from pdserve.clock import MS, S
from pdserve.ids import RequestId, WorkerId
from pdserve.router.entry import Entry
from pdserve.router.fleet import Fleet
from pdserve.router.pairing import nearest
from pdserve.router.prefix_index import Hits
from pdserve.router.slot_arrays import Floats, bits_of, slots_of
from pdserve.router.worker import Worker

DEFER_MAX_NS: Final = 1 * S

KEPT_TOKENS_MAX: Final = 16
"""In ``auto`` mode a prefill worker may keep an answer of at most so many tokens."""


OTHERS_MAX: Final = 2


class Choice:
    """No dataclass: the constructor of one is interpreted, and takes a microsecond."""

    __slots__ = ("ahead_of", "cached_tokens", "decode", "others", "prefill", "price_ns", "reason",
                 "uncached_tokens", "work_ns")  # fmt: skip

    def __init__(
        self,
        prefill: Worker,
        decode: Worker,
        cached_tokens: int,
        uncached_tokens: int,
        work_ns: int,
        price_ns: int,
        reason: str,
        others: tuple[tuple[WorkerId, int], ...],
    ) -> None:
        self.prefill = prefill
        self.decode = decode
        self.cached_tokens = cached_tokens
        self.uncached_tokens = uncached_tokens
        self.work_ns = work_ns  # at that worker
        self.price_ns = price_ns
        self.reason = reason
        self.others = others  # the next best workers, and their prices in ns
        self.ahead_of: RequestId | None = None  # one there that lets it go first


@dataclass(frozen=True, slots=True)
class Deferred:
    """It had better wait for a worker that is not free yet."""

    until_ns: int  # then it takes what is free
    awaited_bits: int  # bit set of the slots of those it waits for


def blocks_of(tokens: int, block_tokens: int) -> int:
    return -(-tokens // block_tokens)  # ceil


def usable_tokens(entry: Entry, blocks: int, block_tokens: int) -> int:
    """Of so many cached leading blocks. What the request itself computed before it was preempted is
    in the store, and counts wherever it goes; the last token is always computed."""
    own_blocks = entry.computed_tokens // block_tokens
    return min(max(blocks, own_blocks) * block_tokens, entry.total_tokens - 1)


def least_uncached(entry: Entry, hits: Hits, block_tokens: int) -> int:
    """Tokens to compute at the worker that has most of them cached."""
    blocks = hits[-1][0] if hits else 0
    return entry.total_tokens - usable_tokens(entry, blocks, block_tokens)


def choose_decode(fleet: Fleet, least_blocks: int, *, tpot_slo_ns: float | None) -> Worker | None:
    """The worker with room whose step would be shortest, or None. Ties go to the lower slot."""
    fleet.settle()
    steps_ns = fleet.step_ns
    slot = int(steps_ns.argmin())
    if fleet.room.item(slot) < least_blocks:  # else nobody else need be asked
        steps_ns = _steps_with_room_ns(fleet, least_blocks)
        slot = int(steps_ns.argmin())
    step_ns = steps_ns.item(slot)
    if step_ns == math.inf:
        return None
    if tpot_slo_ns is not None and step_ns > max(tpot_slo_ns, fleet.costs.decode.step_ns(1, 0)):
        return None
    return fleet.at(slot)


def choose_resume(fleet: Fleet, least_blocks: int, *, parked_by: Worker | None) -> Worker | None:
    """Where a parked request goes on, or None. The worker that parked it comes last, because it was
    short of blocks a moment ago."""
    fleet.settle()
    steps_ns = _steps_with_room_ns(fleet, least_blocks)
    slot = int(steps_ns.argmin())
    if steps_ns[slot] == np.inf:
        return None
    if parked_by is not None and slot == parked_by.slot:
        steps_ns[slot] = np.inf
        other = int(steps_ns.argmin())
        slot = other if steps_ns[other] < np.inf else slot
    return fleet.at(slot)


def _steps_with_room_ns(fleet: Fleet, least_blocks: int) -> Floats:
    """Predicted step times; infinite where there is no room."""
    return np.where(fleet.room >= least_blocks, fleet.step_ns, np.inf)


def _paired(
    fleet: Fleet,
    entry: Entry,
    prefill: Worker,
    shortest: Worker,
    least_blocks: int,
    tpot_slo_ns: float | None,
) -> Worker:
    """Who decodes what ``prefill`` computes, the way there counted too."""
    if shortest is prefill:
        return shortest
    fits_ns = _steps_with_room_ns(fleet, least_blocks)
    if tpot_slo_ns is not None:
        fits_ns[fits_ns > max(tpot_slo_ns, fleet.costs.decode.step_ns(1, 0))] = np.inf
    if fleet.mixed:
        for worker in fleet.all():
            if worker.hello.namespace != prefill.hello.namespace:
                fits_ns[worker.slot] = np.inf
    return nearest(
        fleet,
        prefill,
        shortest,
        fits_ns,
        tokens=entry.total_tokens,
        max_tokens=entry.request.stop.max_tokens,
    )


def own_costs(fleet: Fleet, entry: Entry, hits: Hits, block_tokens: int) -> Floats:
    """What the request costs at each worker from the moment it begins there, by slot, up to the
    last of those that take prompts; infinite at those that take none."""
    count = fleet.prefill_end
    slow = fleet.slow[:count]
    if fleet.shares:
        slow = slow + fleet.streams[:count]
    # Most workers have equally much, so all are priced as those, and then the others once more.
    widths = [bits.bit_count() for _, bits in hits]
    widest = widths.index(max(widths))
    common = supply(fleet, entry, hits[widest][0], block_tokens)
    own_ns: Floats = slow * float(common.work_ns)
    if common.fetch_ns:
        own_ns += float(common.fetch_ns)
    for index, (blocks, bits) in enumerate(hits):
        if index == widest:
            continue
        one = supply(fleet, entry, blocks, block_tokens)
        if widths[index] == 1:
            slot = bits.bit_length() - 1
            own_ns[slot] = slow.item(slot) * one.work_ns + one.fetch_ns
        elif one.work_ns != common.work_ns or one.fetch_ns != common.fetch_ns:
            slots = slots_of(bits)
            own_ns[slots] = slow[slots] * float(one.work_ns) + float(one.fetch_ns)
    if fleet.shares and entry.request.task is None:
        own_ns += fleet.hands_off[:count] * fleet.costs.handoff_ns(entry.total_tokens)
    return own_ns


class Supply:
    """How a worker comes by a prompt's KV. No dataclass, for the reason of ``Choice``."""

    __slots__ = ("cached_tokens", "fetch_ns", "work_ns")

    def __init__(self, cached_tokens: int, work_ns: int, fetch_ns: int) -> None:
        self.cached_tokens = cached_tokens  # that it does not compute
        self.work_ns = work_ns  # of computing the others
        self.fetch_ns = fetch_ns  # of those that another host has; 0: nothing is fetched


def supply(fleet: Fleet, entry: Entry, blocks: int, block_tokens: int) -> Supply:
    """Of a worker that has so many leading blocks: it fetches or recomputes, whichever is sooner
    (``CostModel.fetch_ns``)."""
    costs, total_tokens = fleet.costs, entry.total_tokens
    cached_tokens = usable_tokens(entry, blocks, block_tokens)
    work_ns = costs.prefill_ns(total_tokens - cached_tokens, cached_tokens)
    if entry.stored_blocks > blocks:
        stored_tokens = usable_tokens(entry, entry.stored_blocks, block_tokens)
        if stored_tokens > cached_tokens:
            rest_ns = costs.prefill_ns(total_tokens - stored_tokens, stored_tokens)
            fetch_ns = costs.fetch_ns(stored_tokens - cached_tokens, work_ns - rest_ns)
            if fetch_ns is not None:
                return Supply(stored_tokens, rest_ns, fetch_ns)
    return Supply(cached_tokens, work_ns, 0)


def lead_ns(fleet: Fleet, entry: Entry) -> int:
    """How much earlier it had better be at a worker: what is cached of it has to be loaded."""
    cached_tokens = entry.total_tokens - entry.uncached_tokens
    if cached_tokens == 0:
        return 0
    return fleet.costs.host_ns(cached_tokens)


def place(
    fleet: Fleet,
    entry: Entry,
    hits: Hits,
    *,
    block_tokens: int,
    tpot_slo_ns: float | None,
    now_ns: int,
    only: Worker | None = None,
) -> Choice | Deferred | None:
    """The best route now, the advice to wait for a better one, or None: there is no room.

    ``only``: the prefill worker to which it was bound.
    """
    now = float(now_ns)
    open_by_ns = now + lead_ns(fleet, entry)
    if fleet.soonest_open_ns() > open_by_ns and only is None:
        return None
    least_blocks = blocks_of(entry.total_tokens + 1, block_tokens) + entry.beam_blocks
    ends = entry.request.task is not None
    decode = (
        None
        if ends or fleet.aggregated
        else choose_decode(fleet, least_blocks, tpot_slo_ns=tpot_slo_ns)
    )
    if decode is None and not (fleet.shares or ends):
        return None
    one = fleet.only_open_slot(open_by_ns) if only is None else only.slot
    others: tuple[tuple[WorkerId, int], ...] = ()
    if len(hits) == 1 and not (fleet.shares or fleet.mixed or fleet.is_explained):
        alike = supply(fleet, entry, hits[0][0], block_tokens)
        slot, price_ns = _first_done_alike(fleet, alike, now, one, open_by_ns)
        if price_ns == math.inf:
            return None
    else:
        own_ns = own_costs(fleet, entry, hits, block_tokens)
        _rule_out(fleet, own_ns, decode, least_blocks, ends=ends)
        done_ns = _done_ns(fleet, own_ns, now)
        best = int(done_ns.argmin())
        slot = _first_done(fleet, done_ns, best, open_by_ns) if one is None else one
        price_ns = own_ns.item(slot)
        if price_ns == math.inf:
            return None
        if only is None and slot != best and (len(hits) > 1 or fleet.shares):
            deferred = _deferred(fleet, entry, own_ns, done_ns, slot, best, open_by_ns, now_ns)
            if deferred is not None:
                return deferred
        others = _others(fleet, done_ns, slot, now_ns)
    prefill = fleet.at(slot)
    reason = "bound on arrival" if only is not None else "first done"
    if ends or (fleet.shares and not fleet.hands_off[slot]):
        decode, reason = prefill, reason + (", ends there" if ends else ", decodes too")
    assert decode is not None
    if fleet.is_placed:
        shortest = decode
        decode = _paired(fleet, entry, prefill, shortest, least_blocks, tpot_slo_ns)
        reason += ", decodes near" * (decode is not shortest)
    may_keep = fleet.shares and decode is not prefill and fleet.room.item(slot) >= least_blocks
    if may_keep and _keeps(fleet, entry, prefill, decode):
        decode, reason = prefill, f"{reason}, keeps a short answer"
    blocks = hits[0][0]
    if len(hits) > 1:
        blocks = next(blocks for blocks, bits in hits if bits >> slot & 1)
    supplied = supply(fleet, entry, blocks, block_tokens)
    cached_tokens, fetch_ns = supplied.cached_tokens, supplied.fetch_ns
    reason += ", fetches from another host" * (fetch_ns > 0)
    return Choice(
        prefill=prefill,
        decode=decode,
        cached_tokens=cached_tokens,
        uncached_tokens=entry.total_tokens - cached_tokens,
        work_ns=round(supplied.work_ns * prefill.correction.factor) + fetch_ns,
        price_ns=round(max(0.0, fleet.start_ns.item(slot) - now) + price_ns),
        reason=reason,
        others=others,
    )


def _first_done_alike(
    fleet: Fleet, alike: Supply, now: float, one: int | None, open_by_ns: float
) -> tuple[int, float]:
    """Where as much is cached everywhere: the slot where it would be done first, and its price
    there. Only those that are open are priced, and ``one`` alone if it is given."""
    work_ns, fetch_ns = float(alike.work_ns), float(alike.fetch_ns)
    if one is not None:
        return one, fleet.slow.item(one) * work_ns + fetch_ns
    slots = fleet.open_slots(open_by_ns)
    prices_ns: Floats = fleet.slow[slots] * work_ns
    if fetch_ns:
        prices_ns += fetch_ns
    first = int((np.maximum(fleet.start_ns[slots], now) + prices_ns).argmin())
    return int(slots[first]), prices_ns.item(first)


def _first_done(fleet: Fleet, done_ns: Floats, best: int, open_by_ns: float) -> int:
    """Of those that are open; ``best``: of all."""
    if fleet.open_ns.item(best) <= open_by_ns:
        return best
    slots = fleet.open_slots(open_by_ns)
    return int(slots[done_ns[slots].argmin()])


def _done_ns(fleet: Fleet, own_ns: Floats, now: float) -> Floats:
    """When the request would be done at each worker, once that is done with what it has."""
    done_ns: Floats = np.maximum(fleet.start_ns[: len(own_ns)], now)
    done_ns += own_ns
    return done_ns


def _others(
    fleet: Fleet, done_ns: Floats, slot: int, now_ns: int
) -> tuple[tuple[WorkerId, int], ...]:
    """For people to read, so not where there are more workers than people look at."""
    if not fleet.is_explained:
        return ()
    priced = (w for w in fleet.all() if w.slot < len(done_ns))
    rest = [w for w in priced if w.slot != slot and done_ns[w.slot] < np.inf]
    rest.sort(key=lambda worker: done_ns[worker.slot])
    return tuple((w.id, int(done_ns[w.slot]) - now_ns) for w in rest[:OTHERS_MAX])


def _rule_out(
    fleet: Fleet, own_ns: Floats, decode: Worker | None, least_blocks: int, *, ends: bool
) -> None:
    """Price out the workers from which it could not go on; ``ends``: nor need it."""
    count = len(own_ns)
    if fleet.shares:
        # Who decodes it itself needs the room for it; who does not, needs somebody who has.
        own_ns[(fleet.hands_off[:count] == 0) & (fleet.room[:count] < least_blocks)] = np.inf
        if decode is None and not ends:
            own_ns[fleet.hands_off[:count] == 1] = np.inf
    elif fleet.mixed and not ends:
        assert decode is not None
        for worker in fleet.all():
            if worker.slot < count and worker.hello.namespace != decode.hello.namespace:
                own_ns[worker.slot] = np.inf


def _deferred(
    fleet: Fleet,
    entry: Entry,
    own_ns: Floats,
    done_ns: Floats,
    slot: int,
    best: int,
    open_by_ns: float,
    now_ns: int,
) -> Deferred | None:
    """That it had better wait for ``best``, which is not open, than take ``slot``; None: not.

    Worth it is only what makes the request itself cheaper: its prefix, or no streams to hold up. A
    shorter wait alone is a prediction, and being free is a fact. It waits for the best one, and for
    all that save at least half of what that one saves.
    """
    gain_ns = int(done_ns.item(slot) - done_ns.item(best))
    saved_ns = own_ns.item(slot) - own_ns.item(best)
    if gain_ns < MS or saved_ns <= 0:
        return None
    if entry.deferred_ns is None:
        entry.deferred_ns = now_ns
    until_ns = entry.deferred_ns + min(gain_ns, DEFER_MAX_NS)
    if until_ns <= now_ns:
        return None
    saves = own_ns <= own_ns.item(best) + saved_ns / 2
    return Deferred(until_ns, bits_of(saves & (fleet.open_ns[: len(own_ns)] > open_by_ns)))


def _keeps(fleet: Fleet, entry: Entry, prefill: Worker, decode: Worker) -> bool:
    """Whether a prefill worker had better generate a short answer itself: its steps, each of which
    delays whoever waits there, against the hand-off and the other worker's longer steps."""
    tokens = entry.request.stop.max_tokens
    if tokens > KEPT_TOKENS_MAX:
        return False
    costs = fleet.costs
    here_ns = tokens * costs.decode.step_ns(1, entry.total_tokens) * (1 + len(prefill.prompts))
    there_ns = costs.handoff_ns(entry.total_tokens)
    there_ns += round(tokens * fleet.step_ns[decode.slot])
    return bool(here_ns < there_ns)
