"""What to do next, in this order: resume what is parked, dispatch what waits, preempt.

*What has begun comes first*: while a request is parked for want of decode room, no new one is
dispatched, so nothing new takes the room it waits for.

*Late binding*: a prefill worker is sent what fits into the chunk it computes next, and not much
before it is done with what it computes now; all others wait here, where order is cheap to change. A
route needs both ends, so a request also waits while no decode worker has room for it, or while the
worker that has its prefix will be done sooner than a free one could be. Those behind it that fit
may pass, but not more than ``PASSED_OVER_MAX`` times: then everything waits for it.
"""

import math
from dataclasses import replace
from itertools import islice
from typing import Final

from pdserve.messages import Resume
from pdserve.router.commands import Command, ToWorker
from pdserve.router.duties import vacate
from pdserve.router.entry import Entry
from pdserve.router.lines import first_of
from pdserve.router.orders.base import Order
from pdserve.router.parking import resume_order, swaps
from pdserve.router.placement import Choice, Deferred, blocks_of, choose_resume, lead_ns
from pdserve.router.preempting import preempt
from pdserve.router.sending import Again, Refuse, Send, is_hopeless, placed, refuse_hopeless, take
from pdserve.router.state import RouterState
from pdserve.router.worker import Worker

CANDIDATES_MAX: Final = 32
"""How many waiting requests are looked at when those before them fit nowhere."""

PASSED_OVER_MAX: Final = 32
"""How often later requests may be dispatched before one that fits nowhere yet."""


def plan(state: RouterState, now_ns: int) -> list[Command]:
    """Every command that the books allow now; afterwards there is nothing left to do."""
    state.look_again_ns = None
    commands = vacate(state, now_ns) if state.vacating else []
    if state.parked:
        commands += swaps(state, now_ns) + _resume_parked(state, now_ns)
    if not state.parked:
        commands += _dispatch_waiting(state, now_ns)
    if state.settings.preemption:
        commands += preempt(state, now_ns)
    state.touched.clear()
    return commands


# ── parked ───────────────────────────────────────────────────────────────────────────────────────


def _resume_parked(state: RouterState, now_ns: int) -> list[Command]:
    commands: list[Command] = []
    for entry in resume_order(state, now_ns):
        assert entry.handoff is not None
        tokens = entry.handoff.length
        if is_hopeless(state, entry, tokens):
            commands += refuse_hopeless(state, entry, tokens, now_ns)
            continue
        decode = choose_resume(
            state.fleet,
            blocks_of(tokens + 1, state.fleet.block_tokens) + entry.beam_blocks,
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


def _dispatch_waiting(state: RouterState, now_ns: int) -> list[Command]:
    commands: list[Command] = []
    shared, aside = state.lines.shared, state.lines.aside
    while True:
        recalled = len(aside) > 0 and state.recall(now_ns)
        if not len(shared):
            break
        opens_ns = state.fleet.soonest_open_ns()
        if opens_ns > now_ns:
            opens_ns -= lead_ns(state.fleet, first_of(shared, now_ns))
            if opens_ns > now_ns:
                _look_again(state, opens_ns)
                break
        step = _next_step(state, shared, now_ns)
        if step is not None:
            commands += take(state, step, now_ns)
        elif not recalled:
            break
    if len(aside):
        _look_again(state, aside.next_ns)
    if state.lines.some_are_bound:
        commands += _dispatch_bound(state, now_ns)
    return commands


def _look_again(state: RouterState, at_ns: float) -> None:
    """``math.inf``: no need to."""
    if at_ns < math.inf:
        state.look_again_ns = min(state.look_again_ns or math.ceil(at_ns), math.ceil(at_ns))


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
            commands += take(state, step, now_ns)
    return commands


def _next_step(
    state: RouterState, order: Order, now_ns: int, *, only: Worker | None = None
) -> Send | Refuse | Again | None:
    """What becomes of the first waiting request of which anything can become; None: nothing."""
    passed: list[Entry] = []
    deferred: list[tuple[Entry, Deferred]] = []
    step: Send | Refuse | Again | None = None
    for entry in islice(order.ranked(now_ns), CANDIDATES_MAX):
        if is_hopeless(state, entry, entry.total_tokens):
            step = Refuse(entry)
            break
        choice = placed(state, entry, now_ns, only=only)
        if isinstance(choice, Again):
            return choice
        if isinstance(choice, Choice):
            step = Send(entry, choice, passed)
            break
        if isinstance(choice, Deferred):
            if order.may_stand_aside(entry):
                deferred.append((entry, choice))
                continue
            _look_again(state, choice.until_ns)
        elif entry.passed_over >= PASSED_OVER_MAX:
            break
        passed.append(entry)
    for entry, choice in deferred:
        state.defer(entry, choice.until_ns, choice.awaited_bits)
    return step
