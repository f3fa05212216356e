"""What to do next, in this order: resume what is parked, dispatch what waits, preempt.

*What has begun comes first*: while a request is parked for want of decode room, no new one is
dispatched, so nothing new takes the room it waits for.

*Late binding*: a prefill worker is sent what fits into the chunk it computes next; all others wait
here, where order is cheap to change. A route needs both ends, so a request also waits while no
decode worker has room for it, or while the worker that has its prefix will be done sooner than a
free one could be. Those behind it that fit may pass, but not more than ``PASSED_OVER_MAX`` times:
then everything waits for it.

*Preemption*: a prefill gives way at a chunk boundary to one whose key is better than the key it
would have itself for what is left of it, by more than a chunk. Where one worker prefills, one so
short that it is part of the next chunk goes *ahead* of it there, which costs the other that chunk
and nothing else. For a longer one, or where there are several workers, it *yields*: it goes back to
its line, so that any worker may go on with it; unless it is nearly done, or has yielded often
enough.
"""

from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from pdserve.clock import MS
from pdserve.errors import ErrorInfo, OutOfBlocks, PromptTooLong
from pdserve.lifecycle import Event
from pdserve.messages import Dispatch, Preempt, Refused, Resume, Route
from pdserve.router.commands import Command, ToGateway, ToWorker
from pdserve.router.endings import drop
from pdserve.router.entry import Entry
from pdserve.router.fleet import HELD_MAX, Worker
from pdserve.router.orders.base import Order
from pdserve.router.parking import resume_order, swaps
from pdserve.router.placement import Choice, Deferred, blocks_of, choose_resume, place
from pdserve.router.state import RouterState

CANDIDATES_MAX = 32
"""How many waiting requests are looked at when those before them fit nowhere."""

PASSED_OVER_MAX = 32
"""How often later requests may be dispatched before one that fits nowhere yet."""

YIELDING_MAX = 8
"""Prefills called back at once."""

LEFT_CHUNKS_MIN = 2
"""With fewer chunks left a prefill is not stopped any more."""

OUT_OF_BLOCKS_RETRY_MS = 1000


def plan(state: RouterState, now_ns: int) -> list[Command]:
    """Every command that the books allow now; afterwards there is nothing left to do."""
    state.look_again_ns = None
    commands = swaps(state, now_ns) + _resume_parked(state, now_ns) if state.parked else []
    if not state.parked:
        commands += _dispatch_waiting(state, now_ns)
    if state.settings.preemption:
        commands += _preempt(state, now_ns)
    state.touched.clear()
    return commands


# ── parked ───────────────────────────────────────────────────────────────────────────────────────


def _resume_parked(state: RouterState, now_ns: int) -> list[Command]:
    commands: list[Command] = []
    for entry in resume_order(state, now_ns):
        assert entry.handoff is not None
        tokens = len(entry.handoff.tokens)
        if _is_hopeless(state, tokens):
            commands += _refuse_hopeless(state, entry, tokens, now_ns)
            continue
        decode = choose_resume(
            state.fleet,
            blocks_of(tokens + 1, state.block_tokens),
            parked_by=state.fleet.get(entry.handoff.route.decode),
        )
        if decode is None:
            break
        handoff = state.resume(entry, decode, now_ns)
        route = replace(
            handoff.route,
            decode=decode.id,
            decode_address=decode.hello.address,
            decode_store=decode.hello.store,
        )
        timing = replace(handoff.timing, decisions=entry.decisions)
        commands.append(ToWorker(decode.id, Resume(replace(handoff, route=route, timing=timing))))
    return commands


# ── waiting ──────────────────────────────────────────────────────────────────────────────────────


class _Send(NamedTuple):
    entry: Entry
    choice: Choice
    passed: tuple[Entry, ...]  # better placed in the queue, but they fit nowhere yet


class _Refuse(NamedTuple):
    entry: Entry


class _Again(NamedTuple):
    """Somebody's work is another than believed, and the order with it."""


def _dispatch_waiting(state: RouterState, now_ns: int) -> list[Command]:
    commands: list[Command] = []
    shared = state.lines.shared
    while state.fleet.open_count and len(shared):
        step = _next_step(state, shared, now_ns)
        if step is None:
            break
        commands += _take(state, step, now_ns)
    if len(state.lines) > len(shared):
        commands += _dispatch_bound(state, now_ns)
    return commands


def _dispatch_bound(state: RouterState, now_ns: int) -> list[Command]:
    """Those that were bound to a worker when they arrived: each waits for that one alone."""
    commands: list[Command] = []
    for worker in state.fleet.all():
        if not worker.prefills:
            continue
        order = state.lines.own(worker.id)
        while worker.has_prefill_room and len(order):
            step = _next_step(state, order, now_ns, only=worker)
            if step is None:
                break
            commands += _take(state, step, now_ns)
    return commands


def _next_step(
    state: RouterState, order: Order, now_ns: int, *, only: Worker | None = None
) -> _Send | _Refuse | _Again | None:
    """What becomes of the first waiting request of which anything can become; None: nothing."""
    passed: list[Entry] = []
    for entry in islice(order.ranked(now_ns), CANDIDATES_MAX):
        if _is_hopeless(state, entry.total_tokens):
            return _Refuse(entry)
        choice = _placed(state, entry, now_ns, only=only)
        if isinstance(choice, _Again):
            return choice
        if isinstance(choice, Choice):
            return _Send(entry, choice, tuple(passed))
        if isinstance(choice, Deferred):
            state.look_again_ns = min(state.look_again_ns or choice.until_ns, choice.until_ns)
        elif entry.passed_over >= PASSED_OVER_MAX:
            return None
        passed.append(entry)
    return None


def _placed(
    state: RouterState, entry: Entry, now_ns: int, *, only: Worker | None
) -> Choice | Deferred | _Again | None:
    """Where it goes, as ``place`` says, if its work is what it was believed to be."""
    hits = state.hits(entry)
    if state.reconsider(entry, hits, now_ns):
        return _Again()
    tpot_slo_ms = state.settings.tpot_slo_ms
    return place(
        state.fleet,
        entry,
        hits,
        block_tokens=state.block_tokens,
        tpot_slo_ns=None if tpot_slo_ms is None else tpot_slo_ms * MS,
        only=only,
        now_ns=now_ns,
    )


def _take(state: RouterState, step: _Send | _Refuse | _Again, now_ns: int) -> list[Command]:
    match step:
        case _Again():
            return []
        case _Refuse(entry):
            return _refuse_hopeless(state, entry, entry.total_tokens, now_ns)
        case _Send(entry, choice, passed):
            for other in passed:
                other.passed_over += 1
            timing = state.dispatch(entry, choice, now_ns)
            decode = choice.decode.hello
            route = Route(choice.prefill.id, decode.worker, decode.address, decode.store)
            # An earlier attempt may have left more in a store than has been reported yet.
            cached_tokens = None if entry.request.attempt else choice.cached_tokens
            dispatch = Dispatch(entry.request, route, timing, cached_tokens, choice.ahead_of)
            return [ToWorker(choice.prefill.id, dispatch)]


# ── preemption ───────────────────────────────────────────────────────────────────────────────────


def _preempt(state: RouterState, now_ns: int) -> list[Command]:
    commands: list[Command] = []
    for name in state.touched:
        worker = state.fleet.get(name)
        if worker is None or not worker.prefills:
            continue
        if len(worker.prompts) > 1:
            first, second = (state.entries[request] for request in islice(worker.prompts, 2))
            if _yields(state, first, worker, second, now_ns):
                commands.append(_tell_to_yield(state, first, worker))
        _rank_last(state, worker, now_ns)
    return commands + _make_way(state, now_ns)


def _rank_last(state: RouterState, worker: Worker, now_ns: int) -> None:
    """Enter how easily the last in line there would make way."""
    last = next(reversed(worker.prompts), None)
    key_ns = float("-inf")
    if last is not None:
        entry = state.entries[last]
        may = _may_give_way(state, entry, worker) or _may_yield(state, entry, worker)
        if entry.bound_to is None and may:
            key_ns = state.lines.of(entry).key_ns(entry, now_ns)
    state.fleet.last_key_ns[worker.slot] = key_ns


def _make_way(state: RouterState, now_ns: int) -> list[Command]:
    """For those that wait and beat the worst of those who are last in line: who is short goes ahead
    of it there; for others it is called back.

    What is called back gives up its decode reservation too, so it matters not whether decode has
    room left. Each of those already told to yield makes a place for one before it.
    """
    shared, fleet = state.lines.shared, state.fleet
    commands: list[Command] = []
    if state.parked or not len(fleet.last_key_ns):
        return commands
    keys_ns = fleet.last_key_ns.copy()  # without those that were tried
    while len(shared):
        slot = int(keys_ns.argmax())
        if keys_ns[slot] == float("-inf"):
            break
        worker = fleet.at(slot)
        last = state.entries[next(reversed(worker.prompts))]
        first = next(shared.ranked(now_ns))
        if first.deferred_ns is not None or not _beats(state, first, last, worker, now_ns):
            break
        keys_ns[slot] = float("-inf")
        is_short = first.uncached_tokens <= worker.hello.chunk_tokens
        if is_short and _may_give_way(state, last, worker):
            if _tokens_ahead(first, last, worker) > worker.hello.chunk_tokens:
                continue  # in a chunk's time it is its turn
            step = _ahead(state, first, last, worker, now_ns)
            if step is not None:
                commands += _take(state, step, now_ns)
                _rank_last(state, worker, now_ns)
                keys_ns[slot] = fleet.last_key_ns[slot]
                continue
        if not _may_yield(state, last, worker):
            continue
        told = len(state.yielding)
        entry = next(islice(shared.ranked(now_ns), told, None), None)
        if told >= YIELDING_MAX or entry is None or entry.deferred_ns is not None:
            break
        if told and not _beats(state, entry, last, worker, now_ns):
            break
        fleet.last_key_ns[slot] = float("-inf")
        commands.append(_tell_to_yield(state, last, worker))
    return commands


def _tokens_ahead(entry: Entry, last: Entry, worker: Worker) -> int:
    """Of the next chunk there, with ``entry`` before ``last``. No chunk has room for too many."""
    if len(worker.prompts) >= HELD_MAX:
        return worker.hello.chunk_tokens + 1
    return sum(worker.prompts.values()) - worker.prompts[last.id] + entry.uncached_tokens


def _ahead(
    state: RouterState, entry: Entry, last: Entry, worker: Worker, now_ns: int
) -> _Send | _Again | None:
    """``entry`` sent to where ``last`` is, to be part of the next chunk there; None: no decode
    worker has room for it."""
    choice = _placed(state, entry, now_ns, only=worker)
    if not isinstance(choice, Choice):
        return choice if isinstance(choice, _Again) else None
    # Who was at the front is computed by now, though no chunk has been reported yet.
    last.begun = last.begun or next(iter(worker.prompts)) == last.id
    return _Send(entry, choice._replace(ahead_of=last.id, reason="ahead of a longer one"), ())


def _may_give_way(state: RouterState, entry: Entry, worker: Worker) -> bool:
    """Whether it lets others go first where it is, and keeps its place and its blocks. Only at the
    one worker that prefills: where there are several, it had better go on at whichever is free."""
    if state.fleet.prefill_count > 1:
        return False
    if entry.preempting or not state.lines.of(entry).preempts or worker.draining:
        return False
    return entry.uncomputed_tokens > worker.hello.chunk_tokens


def _may_yield(state: RouterState, entry: Entry, worker: Worker) -> bool:
    """One that has not begun loses nothing by going back, unless it shares the next chunk."""
    if entry.preempting or not state.lines.of(entry).preempts:
        return False
    if not entry.begun and next(iter(worker.prompts)) != entry.id:
        return not worker.has_prefill_room
    left_min = LEFT_CHUNKS_MIN * worker.hello.chunk_tokens
    may_again = entry.preempted_count < state.settings.preempted_max
    return may_again and entry.uncomputed_tokens > left_min


def _yields(state: RouterState, entry: Entry, worker: Worker, waiting: Entry, now_ns: int) -> bool:
    """Whether a dispatched prefill should go back to its line for another one."""
    return _beats(state, waiting, entry, worker, now_ns) and _may_yield(state, entry, worker)


def _beats(state: RouterState, waiting: Entry, entry: Entry, worker: Worker, now_ns: int) -> bool:
    """Whether one that waits goes before one of the same line that is at ``worker``."""
    order = state.lines.of(entry)
    if order is not state.lines.of(waiting):
        return False
    chunk_ns = state.fleet.costs.prefill_ns(worker.hello.chunk_tokens)
    margin_ns = round(chunk_ns * worker.correction.factor)
    return order.yields(entry, waiting, margin_ns, now_ns)


def _tell_to_yield(state: RouterState, entry: Entry, worker: Worker) -> Command:
    entry.preempting = True
    state.yielding[entry.id] = None
    return ToWorker(worker.id, Preempt(entry.id, entry.request.attempt, entry.phase))


# ── decode room ──────────────────────────────────────────────────────────────────────────────────


def _is_hopeless(state: RouterState, tokens: int) -> bool:
    """Whether there are decode workers, and it would not fit into any of them, however empty."""
    largest = state.fleet.largest
    return largest is not None and tokens + 1 > largest.block_count * largest.block_tokens


def _refuse_hopeless(state: RouterState, entry: Entry, tokens: int, now_ns: int) -> list[Command]:
    largest = state.fleet.largest
    assert largest is not None
    error: OutOfBlocks | PromptTooLong
    if tokens > entry.request.prompt_tokens:
        error = OutOfBlocks(
            blocks_of(tokens + 1, largest.block_tokens),
            largest.block_count,
            retry_after_ms=OUT_OF_BLOCKS_RETRY_MS,
        )
    else:
        error = PromptTooLong(tokens, largest.block_count * largest.block_tokens)
    refused = Refused(entry.id, entry.request.attempt, ErrorInfo.of(error))
    commands = drop(state, entry, Event.GAVE_UP, "refused", now_ns)
    return [*commands, ToGateway(entry.request.reply_to, refused)]
