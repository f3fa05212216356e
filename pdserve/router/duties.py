"""Live role switches: a worker prefills from now on, or decodes, and its former work moves.

Every worker has both parts, so a switch is the router's alone: it sends other work there. What is
there of the former role is called back by the messages that preemption uses. Streams are parked in
the store and resume at another worker from where they were; prompts stop at a chunk's border, keep
what is computed of them, and go on elsewhere. Nobody is cancelled, and nothing is computed twice
but what the store has lost.

What was on its way to the worker arrives there first, and is called back then. A worker that does
not heed a call, because the request was between two phases, is called again.

One that *rests* (role ``none``) is drained by an operator: it gets no work, and what it has moves
in the same way. It stays connected, and is put to work again by another switch; for the autoscaler
it is not there, so that a pool that may grow replaces it.

A role lasts as long as the connection: a router that begins anew knows each worker by its pool.

*Standing in.* In ``disaggregated`` mode, when the last worker of a pool dies, those of the other do
its work too until one of that pool is there. A replacement takes seconds to start; a worker that
has both parts takes none. Who leaves in order, as pools do that fall asleep, needs no stand-in.
"""

from enum import StrEnum

from pdserve.clock import S
from pdserve.errors import ConfigError
from pdserve.ids import RequestId
from pdserve.lifecycle import Phase
from pdserve.messages import Preempt, Role
from pdserve.router.commands import Command, ToWorker
from pdserve.router.state import RouterState
from pdserve.router.worker import Worker

CALL_AGAIN_NS = S


class Duty(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"  # in ``auto`` and ``aggregated`` mode: as it was when it came
    NONE = "none"  # rests: drained, and kept


def duty_of(worker: Worker) -> Duty:
    if worker.prefills and worker.decodes:
        return Duty.BOTH
    if worker.prefills:
        return Duty.PREFILL
    return Duty.DECODE if worker.decodes else Duty.NONE


def assign(state: RouterState, worker: Worker, duty: Duty, now_ns: int) -> None:
    """
    Raises:
        ConfigError: the mode knows no such duty, or nobody else would be left for the other.
    """
    mode = state.settings.mode
    if mode == "aggregated" and duty not in (Duty.BOTH, Duty.NONE):
        raise ConfigError("router.mode is aggregated, where every worker does both, or none")
    if duty is Duty.BOTH and mode == "disaggregated":
        raise ConfigError(f"role is both, and router.mode {mode}; both needs router.mode auto")
    prefills = duty in (Duty.PREFILL, Duty.BOTH)
    decodes = duty in (Duty.DECODE, Duty.BOTH)
    others = [w for w in state.fleet.all() if w is not worker and not w.draining]
    for does, what in ((prefills, "prefills"), (decodes, "decodes")):
        if not does and not any(getattr(other, what) for other in others):
            raise ConfigError(
                f"{worker.id} is the only worker that {what}; start or switch another one first"
            )
    role = worker.pool if duty in (Duty.BOTH, Duty.NONE) else Role(duty.value)
    state.fleet.assign(worker, role, prefills=prefills, decodes=decodes)
    state.counters["role_switches"] += 1
    state.vacating[worker.id] = now_ns


def stand_in(state: RouterState, missing: Worker) -> None:
    """Where nobody is left to do what it did, the others do both."""
    if not state.settings.stand_in or state.settings.mode != "disaggregated":
        return
    working = [worker for worker in state.fleet.all() if not worker.draining and not worker.rests]
    if (missing.prefills and not any(worker.prefills for worker in working)) or (
        missing.decodes and not any(worker.decodes for worker in working)
    ):
        for worker in working:
            role = worker.hello.role
            state.fleet.assign(worker, role, prefills=True, decodes=True, stands_in=True)
        state.counters["stand_ins"] += len(working)


def relieve(state: RouterState, come: Worker, now_ns: int) -> None:
    """Those who did the work of its pool as well go back to their own."""
    for worker in [worker for worker in state.fleet.all() if worker.stands_in]:
        role = worker.hello.role
        if role is not come.hello.role:
            prefills = role is Role.PREFILL
            state.fleet.assign(worker, role, prefills=prefills, decodes=not prefills)
            state.vacating[worker.id] = now_ns


def vacate(state: RouterState, now_ns: int) -> list[Command]:
    """Call back what is at workers that have another role now."""
    commands: list[Command] = []
    for name, due_ns in list(state.vacating.items()):
        worker = state.fleet.get(name)
        if worker is None or not _strangers(worker):
            del state.vacating[name]
            continue
        if due_ns > now_ns:
            continue
        state.vacating[name] = now_ns + CALL_AGAIN_NS
        for request in _strangers(worker):
            entry = state.entries[request]
            phase = Phase.PREFILLING if request in worker.prompts else Phase.DECODING
            if entry.phase is phase:
                entry.preempting = True
                commands.append(ToWorker(name, Preempt(entry.id, entry.request.attempt, phase)))
    return commands


def _strangers(worker: Worker) -> list[RequestId]:
    """Requests there that belong to a role it has no more."""
    prompts = [] if worker.prefills else list(worker.prompts)
    streams = [] if worker.decodes else [r for r in worker.streams if r not in prompts]
    return [*prompts, *streams]
