"""How a request leaves before its time, and what workers must be told so that nothing stays behind.

A cancel goes to every worker that may have something of the request; one that has nothing ignores
it. Parked is the exception: no worker has it, and its blocks stay pinned in a store until somebody
uses their ticket. Only decode workers do that, so one is made to take the request up and told to
stop, in one breath; where there is none, the next to come is.
"""

from pdserve.ids import WorkerId
from pdserve.lifecycle import Event, Phase
from pdserve.messages import Cancel, Handoff, Lost, Resume
from pdserve.router.commands import Command, ToGateway, ToWorker
from pdserve.router.ended import EndedBook
from pdserve.router.entry import Entry
from pdserve.router.fleet import Worker
from pdserve.router.state import RouterState
from pdserve.router.suspicion import deaths_in_place, implicated
from pdserve.suspicion import is_alone


def drop(
    state: RouterState, entry: Entry, event: Event, counter: str, now_ns: int
) -> list[Command]:
    """Forget it here, and have it stopped wherever it may be."""
    # While it is prefilling, decode may have been handed it a moment ago.
    holders = dict.fromkeys(h for h in (entry.prefill, entry.decode) if h is not None)
    handoff = entry.handoff
    attempt = entry.request.attempt
    state.leave(entry, event, counter, now_ns)
    if handoff is not None:
        return free_ticket(state, handoff)
    return [
        ToWorker(holder, Cancel(entry.id, attempt))
        for holder in holders
        if state.fleet.get(holder) is not None
    ]


def lose(
    state: RouterState,
    entry: Entry,
    worker: WorkerId,
    now_ns: int,
    *,
    implicated: bool = False,
    alone: bool = False,
) -> list[Command]:
    """Its worker cannot go on with it: the gateway is told, and the other end, if any.

    Args:
        implicated, alone: as in ``Lost``.
    """
    # With whom it was to be resumed: its ticket may be unused, and is its writer's, who lives.
    resumed = entry.resumed if entry.decode == worker else None
    commands: list[Command] = [
        command
        for command in drop(state, entry, Event.WORKER_LOST, "lost", now_ns)
        if not (isinstance(command, ToWorker) and command.worker == worker)
    ]
    if resumed is not None:
        commands += free_ticket(state, resumed, but=worker)
    lost = Lost(entry.id, entry.request.attempt, worker, implicated, alone)
    return [*commands, ToGateway(entry.request.reply_to, lost)]


def lose_with(
    state: RouterState, worker: Worker, ended: EndedBook, now_ns: int, *, died: bool
) -> list[Command]:
    """All that a worker had, and what may have been lost on its way from there.

    Args:
        ended: of all workers.
        died: of something that it had, perhaps; else it lives, and was only not heard.
    """
    has_drained = worker.draining and not worker.held
    held = [state.entries[request] for request in worker.held]
    suspects = {e.id: deaths_in_place(e) for e in implicated(held, worker.id)} if died else {}
    commands: list[Command] = []
    for entry in held:
        others = (deaths for other, deaths in suspects.items() if other != entry.id)
        commands += lose(
            state,
            entry,
            worker.id,
            now_ns,
            implicated=entry.id in suspects,
            alone=entry.id in suspects and is_alone(suspects[entry.id], others),
        )
    if not has_drained:  # who has, went when all it had said had arrived
        for entry in _handed_over_by(state, worker.id):
            commands += lose(state, entry, worker.id, now_ns)
        commands += ended.worker_lost(worker.id, now_ns)
    return commands


def _handed_over_by(state: RouterState, worker: WorkerId) -> list[Entry]:
    """Whose hand-off may have been lost with the worker that sent it: decode has not adopted
    them. Those that did arrive find most of their prompt in the store. Linear in requests."""
    return [
        entry
        for entry in state.entries.values()
        if entry.phase is Phase.HANDING_OFF and entry.prefilled_by == worker
    ]


def lose_storeless(state: RouterState, now_ns: int) -> list[Command]:
    """Parked requests whose blocks lie where no worker is left to reach them for us."""
    commands: list[Command] = []
    for request in list(state.parked):
        entry = state.entries[request]
        handoff = entry.handoff
        assert handoff is not None
        if not state.fleet.has_store(handoff.store):
            commands += lose(state, entry, handoff.route.decode, now_ns)
    return commands


def free_ticket(
    state: RouterState, handoff: Handoff, *, but: WorkerId | None = None
) -> list[Command]:
    """Nobody will resume this. Preferably not at a worker that drains, which might hand it back
    before it reads the cancel, nor where a later attempt is to run; never at ``but``, which is
    lost."""
    request = handoff.request
    workers = [worker for worker in state.fleet.all() if worker.decodes and worker.id != but]
    if not workers:
        state.orphans.append(handoff)
        return []
    choice = min(
        workers,
        key=lambda w: (
            w.draining,
            request.request in w.streams,
            w.id != handoff.route.decode,
            w.id,
        ),
    )
    return [
        ToWorker(choice.id, Resume(handoff)),
        ToWorker(choice.id, Cancel(request.request, request.attempt)),
    ]


def free_orphans(state: RouterState) -> list[Command]:
    """A decode worker has come: it can free what was left while there was none."""
    orphans = list(state.orphans)
    state.orphans.clear()
    return [command for handoff in orphans for command in free_ticket(state, handoff)]
