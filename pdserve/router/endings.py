"""How a request leaves before its time, and what workers must be told so that nothing stays behind.

A cancel goes to every worker that may have something of the request; one that has nothing ignores
it. Parked is the exception: no worker has it, and its blocks stay pinned in a store until somebody
uses their ticket. Only decode workers do that, so one is made to take the request up and told to
stop, in one breath; where there is none, the next to come is. A request may end while its ticket is
on the way to who takes it up: who that was is remembered, in case that it dies first.
"""

from pdserve.errors import StepFailed
from pdserve.ids import RequestId, WorkerId
from pdserve.lifecycle import Event, Phase
from pdserve.messages import Cancel, Handoff, Lost, Resume, WorkerFailed
from pdserve.router.commands import Command, ToGateway, ToWorker
from pdserve.router.ended import KEPT_NS, EndedBook
from pdserve.router.entry import Entry, Unconfirmed
from pdserve.router.state import RouterState
from pdserve.router.suspicion import deaths_in_place, implicated
from pdserve.router.worker import Worker
from pdserve.suspicion import is_alone


def drop(
    state: RouterState, entry: Entry, event: Event, counter: str, now_ns: int
) -> list[Command]:
    """Forget it here, and have it stopped wherever it may be."""
    # While it is prefilling, decode may have been handed it a moment ago.
    holders = dict.fromkeys(h for h in (entry.prefill, entry.decode) if h is not None)
    handoff = entry.handoff
    attempt = entry.request.attempt
    if entry.resumed is not None and entry.decode is not None:
        state.unconfirmed.append(Unconfirmed(entry.resumed, entry.decode, now_ns))
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
    commands: list[Command] = [
        command
        for command in drop(state, entry, Event.WORKER_LOST, "lost", now_ns)
        if not (isinstance(command, ToWorker) and command.worker == worker)
    ]
    lost = Lost(entry.id, entry.request.attempt, worker, implicated, alone)
    return [*commands, ToGateway(entry.request.reply_to, lost)]


def fail(
    state: RouterState, entry: Entry, failed: WorkerFailed, worker: WorkerId, now_ns: int
) -> list[Command]:
    """Its worker says that it cannot go on with it."""
    by_step = failed.error.kind == StepFailed.kind
    commands = lose(state, entry, worker, now_ns, implicated=by_step, alone=failed.alone)
    return _free_unconfirmed(state, worker, now_ns, request=entry.id) + commands


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
    commands = _free_unconfirmed(state, worker.id, now_ns) + commands
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
    state: RouterState,
    handoff: Handoff,
    *,
    failed_by: WorkerId | None = None,
    lives: bool = False,
) -> list[Command]:
    """Nobody will resume this. Preferably not at a worker that drains, which might hand it back
    before it reads the cancel, nor where a later attempt is to run, nor where it has failed; never
    there unless that worker ``lives``."""
    request = handoff.request
    workers = [w for w in state.fleet.all() if w.decodes and (lives or w.id != failed_by)]
    if not workers:
        state.orphans.append(handoff)
        return []
    choice = min(
        workers,
        key=lambda w: (
            w.draining,
            request.request in w.streams,
            w.id == failed_by,
            w.id != handoff.route.decode,
            w.id,
        ),
    )
    return [
        ToWorker(choice.id, Resume(handoff)),
        ToWorker(choice.id, Cancel(request.request, request.attempt)),
    ]


def _free_unconfirmed(
    state: RouterState, worker: WorkerId, now_ns: int, *, request: RequestId | None = None
) -> list[Command]:
    """Tickets that ``worker`` was to take up and may not have: they are their writers', who live.
    Linear in those.

    Args:
        request: the one that it says to have failed; None: it is lost, with all of them.
    """
    found: list[Unconfirmed] = []
    for _ in range(len(state.unconfirmed)):
        each = state.unconfirmed.popleft()
        if each.at_ns + KEPT_NS <= now_ns:
            continue
        if each.worker == worker and request in (None, each.handoff.request.request):
            found.append(each)
        else:
            state.unconfirmed.append(each)
    lives = request is not None
    return [
        command
        for each in found
        for command in free_ticket(state, each.handoff, failed_by=worker, lives=lives)
    ]


def free_orphans(state: RouterState) -> list[Command]:
    """A decode worker has come: it can free what was left while there was none."""
    orphans = list(state.orphans)
    state.orphans.clear()
    return [command for handoff in orphans for command in free_ticket(state, handoff)]
