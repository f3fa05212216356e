"""How a request leaves before its time, and what workers must be told so that nothing stays behind.

A cancel goes to every worker that may have something of the request; one that has nothing ignores
it. Parked is the exception: no worker has it, and its blocks stay pinned in a store until somebody
uses their ticket. Only decode workers do that, so one is made to take the request up and told to
stop, in one breath; where there is none, the next to come is.
"""

from pdserve.ids import WorkerId
from pdserve.lifecycle import Event
from pdserve.messages import Cancel, Handoff, Lost, Resume
from pdserve.router.commands import Command, ToGateway, ToWorker
from pdserve.router.entry import Entry
from pdserve.router.state import RouterState


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
    commands: list[Command] = [
        command
        for command in drop(state, entry, Event.WORKER_LOST, "lost", now_ns)
        if not (isinstance(command, ToWorker) and command.worker == worker)
    ]
    lost = Lost(entry.id, entry.request.attempt, worker, implicated, alone)
    return [*commands, ToGateway(entry.request.reply_to, lost)]


def free_ticket(state: RouterState, handoff: Handoff) -> list[Command]:
    """Nobody will resume this. Preferably not at a worker that drains, which might hand it back
    before it reads the cancel, nor where a later attempt is to run."""
    request = handoff.request
    workers = [worker for worker in state.fleet.all() if worker.decodes]
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
