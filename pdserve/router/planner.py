"""What to do next, in this order: resume what is parked, dispatch what waits, preempt.

*What has begun comes first*: while a request is parked for want of decode room, no new one is
dispatched, so nothing new takes the room it waits for. The parked go in the order they came.

*Late binding*: a prefill worker is sent at most one request beyond the one it computes; all others
wait here, where order is cheap to change. A route needs both ends, so a request also waits while no
decode worker has room for it. Those behind it that fit may pass, but not more than
``PASSED_OVER_MAX`` times: then everything waits for it.

*Preemption*: a prefill yields at a chunk boundary to one whose key is better than the key it would
have itself for what is left of it, by more than a chunk; unless it is nearly done, or has yielded
often enough. The one to yield to is either the next at the same worker, or the head of the queue
when no worker has a place left for it: then the last in line somewhere is called back.
"""

from dataclasses import dataclass, replace
from itertools import islice

from pdserve.errors import ErrorInfo, OutOfBlocks, PromptTooLong
from pdserve.ids import WorkerId
from pdserve.lifecycle import Event
from pdserve.messages import Dispatch, Preempt, Refused, Resume, Role, Route
from pdserve.router.commands import Command, ToGateway, ToWorker
from pdserve.router.endings import drop
from pdserve.router.fleet import Worker
from pdserve.router.placement import (
    PrefillOption,
    blocks_of,
    choose_decode,
    choose_prefill,
    choose_resume,
)
from pdserve.router.state import Entry, RouterState

CANDIDATES_MAX = 16
"""How many waiting requests are looked at when those before them fit nowhere."""

PASSED_OVER_MAX = 32
"""How often later requests may be dispatched before one that fits nowhere yet."""

OUT_OF_BLOCKS_RETRY_MS = 1000


def plan(state: RouterState, now_ns: int) -> list[Command]:
    """Every command that the books allow now; afterwards there is nothing left to do."""
    commands = _resume_parked(state)
    while not state.parked and (step := _next_step(state)) is not None:
        commands += _take(state, step, now_ns)
    return commands + _preempt(state)


# ── parked ───────────────────────────────────────────────────────────────────────────────────────


def _resume_parked(state: RouterState) -> list[Command]:
    commands: list[Command] = []
    while state.parked:
        entry = state.entries[next(iter(state.parked))]
        handoff = entry.handoff
        assert handoff is not None
        if _is_hopeless(state, len(handoff.tokens)):
            commands += _refuse_hopeless(state, entry, len(handoff.tokens))
            continue
        workers = _open_decodes(state)
        least_blocks = _least_blocks(workers, len(handoff.tokens))
        choice = choose_resume(
            [worker.decode_option() for worker in workers],
            least_blocks=least_blocks,
            parked_by=handoff.route.decode,
        )
        if choice is None:
            break
        decode = _known(state, choice.worker)
        state.resume(entry, decode, blocks=least_blocks)
        route = replace(
            handoff.route,
            decode=decode.id,
            decode_address=decode.hello.address,
            decode_store=decode.hello.store,
        )
        commands.append(ToWorker(decode.id, Resume(replace(handoff, route=route))))
    return commands


# ── waiting ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Send:
    entry: Entry
    prefill: Worker
    decode: Worker
    blocks: int
    passed: tuple[Entry, ...]  # better placed in the queue, but they fit nowhere


@dataclass(frozen=True, slots=True)
class _Demote:
    entry: Entry
    work_ns: int


@dataclass(frozen=True, slots=True)
class _Refuse:
    entry: Entry


_Step = _Send | _Demote | _Refuse


def _next_step(state: RouterState) -> _Step | None:
    """What becomes of the first waiting request of which anything can become; None: nothing."""
    if not any(worker.has_prefill_room for worker in state.fleet.of(Role.PREFILL)):
        return None
    passed: list[Entry] = []
    for request in islice(state.queue.in_order(), CANDIDATES_MAX):
        entry = state.entries[request]
        if _is_hopeless(state, len(entry.request.tokens)):
            return _Refuse(entry)
        work_ns = state.least_work_ns(entry)
        if state.ladder.level_of(work_ns) > entry.level:
            return _Demote(entry, work_ns)  # the cached prefix it counted on is gone
        send = _route(state, entry, tuple(passed))
        if send is not None:
            return send
        if entry.passed_over >= PASSED_OVER_MAX:
            return None
        passed.append(entry)
    return None


def _take(state: RouterState, step: _Step, now_ns: int) -> list[Command]:
    match step:
        case _Refuse(entry):
            return _refuse_hopeless(state, entry, len(entry.request.tokens))
        case _Demote(entry, work_ns):
            state.demote_waiting(entry, work_ns)
            return []
        case _Send(entry, prefill, decode, blocks, passed):
            for other in passed:
                other.passed_over += 1
            timing = state.dispatch(entry, prefill, decode, blocks=blocks, now_ns=now_ns)
            route = Route(prefill.id, decode.id, decode.hello.address, decode.hello.store)
            return [ToWorker(prefill.id, Dispatch(entry.request, route, timing))]


def _route(state: RouterState, entry: Entry, passed: tuple[Entry, ...]) -> _Send | None:
    workers = _open_decodes(state)
    least_blocks = _least_blocks(workers, len(entry.request.tokens))
    choice = choose_decode(
        [worker.decode_option() for worker in workers], least_blocks=least_blocks
    )
    if choice is None:
        return None
    decode = _known(state, choice.worker)
    options = [
        _prefill_option(state, entry, worker)
        for worker in state.fleet.of(Role.PREFILL)
        if not worker.draining and worker.hello.namespace == decode.hello.namespace
    ]
    best = choose_prefill(options)
    if best is None:
        return None
    return _Send(entry, _known(state, best.worker), decode, least_blocks, passed)


def _prefill_option(state: RouterState, entry: Entry, worker: Worker) -> PrefillOption:
    cached_tokens = state.cached_tokens(entry, worker)
    key_ns = state.ladder.key_ns(entry.virtual_ns, entry.level)
    wait_ns = 0
    for request in worker.held:
        ahead = state.entries[request]
        yields = _yields(state, ahead, worker, key_ns)
        wait_ns += worker.chunk_ns() if yields else worker.rate.work_ns(ahead.uncomputed_tokens)
    return PrefillOption(
        worker=worker.id,
        wait_ns=wait_ns,
        work_ns=worker.rate.work_ns(len(entry.request.tokens) - cached_tokens),
        cached_tokens=cached_tokens,
        is_idle=worker.busy_count == 0,
        has_room=worker.has_prefill_room,
    )


# ── preemption ───────────────────────────────────────────────────────────────────────────────────


def _preempt(state: RouterState) -> list[Command]:
    if not state.preempts:
        return []
    commands: list[Command] = []
    for worker in state.fleet.of(Role.PREFILL):
        held = [state.entries[request] for request in worker.held]
        if len(held) > 1 and _yields(state, held[0], worker, state.key_now_ns(held[1])):
            commands.append(_tell_to_yield(held[0], worker))
    return commands + _call_back(state)


def _call_back(state: RouterState) -> list[Command]:
    """Make a place for the head of the queue, if it beats somebody who is last in line.

    One at a time. What is called back gives up its decode reservation too, so it matters not
    whether decode has room left.
    """
    head = next(state.queue.in_order(), None)
    if head is None or state.parked:
        return []
    entry = state.entries[head]
    key_ns = state.ladder.key_ns(entry.virtual_ns, entry.level)
    places = [worker for worker in state.fleet.of(Role.PREFILL) if worker.held]
    lasts = [(state.entries[next(reversed(worker.held))], worker) for worker in places]
    if any(last.preempting for last, _ in lasts):
        return []
    beaten = [(last, worker) for last, worker in lasts if _yields(state, last, worker, key_ns)]
    if not beaten:
        return []
    last, worker = max(beaten, key=lambda pair: (state.key_now_ns(pair[0]), pair[0].order))
    return [_tell_to_yield(last, worker)]


def _yields(state: RouterState, entry: Entry, worker: Worker, to_key_ns: int) -> bool:
    """Whether a dispatched prefill should stop for another one with that key."""
    return (
        state.preempts
        and not entry.preempting
        and entry.preempted_count < state.settings.preempted_max
        and entry.uncomputed_tokens > worker.hello.chunk_tokens
        and to_key_ns + worker.chunk_ns() < state.key_now_ns(entry)
    )


def _tell_to_yield(entry: Entry, worker: Worker) -> Command:
    entry.preempting = True
    return ToWorker(worker.id, Preempt(entry.id, entry.request.attempt))


# ── decode room ──────────────────────────────────────────────────────────────────────────────────


def _open_decodes(state: RouterState) -> list[Worker]:
    return [worker for worker in state.fleet.of(Role.DECODE) if not worker.draining]


def _least_blocks(workers: list[Worker], tokens: int) -> int:
    """For the tokens there are and the next one; block sizes agree within a cluster."""
    return max((blocks_of(tokens + 1, w.hello.block_tokens) for w in workers), default=0)


def _is_hopeless(state: RouterState, tokens: int) -> bool:
    """Whether there are decode workers, and it would not fit into any of them, however empty."""
    sizes = [w.hello.block_count * w.hello.block_tokens for w in state.fleet.of(Role.DECODE)]
    return bool(sizes) and tokens + 1 > max(sizes)


def _refuse_hopeless(state: RouterState, entry: Entry, tokens: int) -> list[Command]:
    largest = max(state.fleet.of(Role.DECODE), key=lambda worker: worker.hello.block_count).hello
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
    commands = drop(state, entry, Event.GAVE_UP, "refused")
    return [*commands, ToGateway(entry.request.reply_to, refused)]


def _known(state: RouterState, worker: WorkerId) -> Worker:
    found = state.fleet.get(worker)
    assert found is not None, f"{worker} was just chosen among those known"
    return found
