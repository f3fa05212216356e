"""Preemption of prefills: who stops at a chunk boundary, and for whom.

A prefill stops for one whose key is better than the key it would have itself for what is left of
it, by more than a chunk, if no other worker is done sooner than it could stop. One so short that it
is part of the next chunk goes *ahead* of it where it is, which costs the other that chunk and
nothing else. For a longer one it *yields*: it goes back to its line, so that any worker may go on
with it; unless it is nearly done, or has yielded often enough, or the store has lost too much of
what others had computed when they did.
"""

import math
from itertools import islice
from typing import Final

from pdserve.messages import Preempt
from pdserve.router.commands import Command, ToWorker
from pdserve.router.entry import Entry
from pdserve.router.fleet import LEAD_NS
from pdserve.router.lines import first_of
from pdserve.router.placement import Choice
from pdserve.router.sending import Again, Send, placed, take
from pdserve.router.slot_arrays import Floats
from pdserve.router.state import RouterState
from pdserve.router.worker import HELD_MAX, Worker

YIELDING_MAX: Final = 8
"""Prefills called back at once."""

LEFT_CHUNKS_MIN: Final = 6
"""With fewer chunks left a prefill is not called back any more. To go on elsewhere costs a way
through the store, and one that is nearly done would be back among the first anyway."""


def preempt(state: RouterState, now_ns: int) -> list[Command]:
    """Of the workers whose prompts have changed, and for the first of those that wait."""
    commands: list[Command] = []
    for name in state.touched:
        worker = state.fleet.get(name)
        if worker is None or not worker.prefills:
            continue
        if len(worker.prompts) > 1:
            first, second = [state.entries[request] for request in islice(worker.prompts, 2)]
            if _yields(state, first, worker, second, now_ns):
                commands.append(_tell_to_yield(state, first, worker))
        _rank_last(state, worker, now_ns)
    return commands + _make_way(state, now_ns)


def _rank_last(state: RouterState, worker: Worker, now_ns: int) -> None:
    """Enter how easily the last in line there would make way."""
    last = next(reversed(worker.prompts), None)
    key_ns = -math.inf
    if last is not None:
        entry = state.entries[last]
        if entry.bound_to is None and (
            _may_give_way(state, entry, worker) or _may_yield(state, entry, worker)
        ):
            key_ns = state.lines.shared.key_ns(entry, now_ns)
    state.fleet.rank_last(worker, key_ns)


def _make_way(state: RouterState, now_ns: int) -> list[Command]:
    """For those that wait and beat the worst of those who are last in line: who is short goes ahead
    of it there; for others it is called back.

    What is called back gives up its decode reservation too, so it matters not whether decode has
    room left. Each of those already told to yield makes a place for one before it.
    """
    shared, fleet = state.lines.shared, state.fleet
    commands: list[Command] = []
    keys_ns: Floats | None = None  # without those that were tried
    while len(shared) and not state.parked:
        slot = fleet.last_of_all() if keys_ns is None else _largest(keys_ns)
        if slot is None:
            break
        worker = fleet.at(slot)
        last = state.entries[next(reversed(worker.prompts))]
        first = first_of(shared, now_ns)
        if first.deferred_ns is not None or not _beats(state, first, last, worker, now_ns):
            break
        if fleet.is_another_open_by(_border_ns(worker, now_ns) - LEAD_NS, but=slot):
            break
        keys_ns = fleet.last_keys_ns() if keys_ns is None else keys_ns
        keys_ns[slot] = -math.inf
        is_short = first.uncached_tokens <= worker.chunk_tokens
        if is_short and _may_give_way(state, last, worker):
            share = 1 - state.lines.of(last).kept_share(last, now_ns)
            if _tokens_ahead(first, last, worker) > share * worker.chunk_tokens:
                continue  # in a chunk's time it is its turn
            step = _ahead(state, first, last, worker, now_ns)
            if step is not None:
                commands += take(state, step, now_ns)
                _rank_last(state, worker, now_ns)
                keys_ns[slot] = fleet.last_key_ns(slot)
                continue
        if not _may_yield(state, last, worker):
            continue
        told = len(state.yielding)
        if told >= YIELDING_MAX:
            break
        entry = next(islice(shared.ranked(now_ns), told, None), None)
        if entry is None or entry.deferred_ns is not None:
            break
        if told and not _beats(state, entry, last, worker, now_ns):
            break
        fleet.rank_last(worker, -math.inf)
        commands.append(_tell_to_yield(state, last, worker))
    return commands


def _largest(keys_ns: Floats) -> int | None:
    slot = int(keys_ns.argmax())
    return None if keys_ns.item(slot) == -math.inf else slot


def _border_ns(worker: Worker, now_ns: int) -> float:
    """When its next chunk begins, as predicted."""
    chunk_ns = worker.chunk_ns * worker.correction.factor
    return now_ns + max(0.0, worker.free_at_ns - now_ns) % chunk_ns


def _tokens_ahead(entry: Entry, last: Entry, worker: Worker) -> int:
    """Of the next chunk there, with ``entry`` before ``last``. No chunk has room for too many."""
    if len(worker.prompts) >= HELD_MAX:
        return worker.chunk_tokens + 1
    return worker.left_tokens - worker.prompts[last.id].tokens + entry.uncached_tokens


def _ahead(
    state: RouterState, entry: Entry, last: Entry, worker: Worker, now_ns: int
) -> Send | Again | None:
    """``entry`` sent to where ``last`` is, to be part of the next chunk there; None: no decode
    worker has room for it."""
    choice = placed(state, entry, now_ns, only=worker)
    if not isinstance(choice, Choice):
        return choice if isinstance(choice, Again) else None
    # Who was at the front is computed by now, though no chunk has been reported yet.
    last.begun = last.begun or next(iter(worker.prompts)) == last.id
    choice.ahead_of, choice.reason = last.id, "ahead of a longer one"
    return Send(entry, choice, ())


def _may_give_way(state: RouterState, entry: Entry, worker: Worker) -> bool:
    """Whether it lets others go first where it is, and keeps its place and its blocks."""
    if entry.preempting or worker.draining:
        return False
    is_long = entry.uncomputed_tokens > worker.chunk_tokens
    return is_long and state.lines.of(entry).preempts


def _may_yield(state: RouterState, entry: Entry, worker: Worker) -> bool:
    """One that has not begun loses nothing by going back, unless it shares the next chunk."""
    if entry.preempting or not state.lines.of(entry).preempts:
        return False
    if not entry.begun and next(iter(worker.prompts)) != entry.id:
        return not worker.has_prefill_room
    left_min = LEFT_CHUNKS_MIN * worker.chunk_tokens
    if state.recompute_credit < 0:
        return False
    may_again = entry.preempted_count < state.settings.preempted_max
    return may_again and entry.uncomputed_tokens > left_min


def _yields(state: RouterState, entry: Entry, worker: Worker, waiting: Entry, now_ns: int) -> bool:
    """Whether a dispatched prefill should go back to its line for another one."""
    return _beats(state, waiting, entry, worker, now_ns) and _may_yield(state, entry, worker)


def _beats(state: RouterState, waiting: Entry, entry: Entry, worker: Worker, now_ns: int) -> bool:
    """Whether one that waits goes before one of the same line that is at ``worker``."""
    if entry.bound_to != waiting.bound_to:
        return False
    margin_ns = round(worker.chunk_ns * worker.correction.factor)
    return state.lines.of(entry).yields(entry, waiting, margin_ns, now_ns)


def _tell_to_yield(state: RouterState, entry: Entry, worker: Worker) -> Command:
    entry.preempting = True
    state.yielding[entry.id] = None
    return ToWorker(worker.id, Preempt(entry.id, entry.request.attempt, entry.phase))
