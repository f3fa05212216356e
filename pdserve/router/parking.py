"""Decode beyond its room: whom to resume, and whom to park for whom.

A decode worker that runs short of blocks parks its latest streams by itself. Which of the parked
goes on first, and whether a running one should make place for it, is a ``DecodeOrder``'s to say;
here its wishes become messages. Nobody is asked while nobody is parked.
"""

from pdserve.clock import MS
from pdserve.lifecycle import Phase
from pdserve.messages import Preempt, Role
from pdserve.router.commands import Command, ToWorker
from pdserve.router.decode_base import DecodeRoom, Stream
from pdserve.router.entry import Entry
from pdserve.router.lengths import class_of
from pdserve.router.state import RouterState

ASK_EVERY_NS = 100 * MS
"""How often swaps are considered while somebody is parked."""


def resume_order(state: RouterState, now_ns: int) -> list[Entry]:
    """The parked, whoever goes on first first."""
    if len(state.parked) == 1:
        return [state.entries[next(iter(state.parked))]]
    parked = [_stream(state, state.entries[request]) for request in state.parked]
    return [state.entries[one.request] for one in state.decode_order.resume_order(parked, now_ns)]


def swaps(state: RouterState, now_ns: int) -> list[Command]:
    """Tell running streams to park for those that wait."""
    if not state.parked or now_ns < state.ask_swaps_ns:
        return []
    state.ask_swaps_ns = now_ns + ASK_EVERY_NS
    # A prefill worker that keeps a short answer is left alone.
    workers = {worker.id: worker for worker in state.fleet.of(Role.DECODE)}
    parked, running = [], []
    for entry in state.entries.values():
        if entry.phase is Phase.PARKED:
            parked.append(_stream(state, entry))
        elif entry.phase is Phase.DECODING and entry.decode in workers and not entry.preempting:
            running.append(_stream(state, entry))
    rooms = [
        DecodeRoom(
            worker=worker.id,
            sequences=len(worker.streams),
            running_max=worker.hello.running_max,
            free_tokens=max(0, worker.free_blocks - worker.reserved_blocks)
            * worker.hello.block_tokens,
            capacity_tokens=worker.hello.block_count * worker.hello.block_tokens,
        )
        for worker in workers.values()
        if worker.decodes and not worker.draining
    ]
    commands: list[Command] = []
    for swap in state.decode_order.swaps(running, parked, rooms, now_ns):
        out = state.entries[swap.out]
        assert out.decode is not None
        out.preempting = True
        state.counters["swaps"] += 1
        commands.append(ToWorker(out.decode, Preempt(out.id, out.request.attempt, out.phase)))
    return commands


def finished(state: RouterState, entry: Entry, now_ns: int) -> None:
    """What an answer's length teaches."""
    if state.settings.decode_admission == "peak":
        state.growth.finished(entry)
    state.decode_order.finished(
        class_of(entry.request),
        entry.generated_tokens,
        now_ns,
        context_tokens=entry.request.prompt_tokens + entry.generated_tokens,
        arrived_ns=entry.arrived_ns,
    )


def _stream(state: RouterState, entry: Entry) -> Stream:
    return Stream(
        request=entry.id,
        cls=class_of(entry.request),
        arrived_ns=entry.arrived_ns,
        generated_tokens=entry.generated_tokens,
        context_tokens=entry.request.prompt_tokens + entry.generated_tokens,
        worker=entry.decode,
        since_ns=entry.queued_at_ns if entry.phase is Phase.PARKED else entry.adopted_ns,
        moves=entry.parked_count,
        oracle_tokens=None if state.oracle is None else state.oracle(entry.id),
    )
