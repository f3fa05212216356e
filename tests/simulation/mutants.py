"""Bugs planted one at a time in production code, to show that the simulation would see them.

Each takes away one guard. A mutant that no seed finds is a rule that nobody watches.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pdserve.clock import MS, S
from tests.simulation.faults import Fault
from tests.simulation.run import Plan, simulate
from tests.simulation.shape import Shape

SEEDS_MAX = 400

TOGETHER = Plan(
    Shape(
        hosts=2, prefills=0, decodes=6, gateways=2, mode="aggregated", slots=64, pool_blocks=32
    ),
    (
        Fault(50 * MS, "slow network", 3 * S),
        Fault(150 * MS, "kill together", S),
        Fault(300 * MS, "kill together", S),
    ),
)  # fmt: skip
"""Hosts lose all their workers, and the news of each takes another time."""


@dataclass(frozen=True, slots=True)
class Mutant:
    name: str
    plant: Callable[[], contextlib.AbstractContextManager[None]]
    plan: Plan | None = None  # in which it shows sooner than in what seeds draw


@dataclass(frozen=True, slots=True)
class Found:
    mutant: str
    seeds: int  # that it took, from 0 on; 0: it was not found
    violation: str


@contextlib.contextmanager
def instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _forgotten_ticket() -> contextlib.AbstractContextManager[None]:
    from pdserve.prefill.prompts import Prompts

    return instead(Prompts, "_abort_ticket", _nothing)


def _ticket_keeps_pins() -> contextlib.AbstractContextManager[None]:
    from pdserve.kvstore.tickets import TicketBook, TicketEvent, TicketState

    def end(self: Any, ticket: Any) -> None:
        if ticket.state is TicketState.QUEUED:
            self._queue.remove(ticket)
        ticket.advance(TicketEvent.ENDED)
        del self._tickets[ticket.ticket]
        self._free_reserved(ticket)

    return instead(TicketBook, "end", end)


def _claims_outlive_their_owner() -> contextlib.AbstractContextManager[None]:
    from pdserve.kvstore.core import StoreCore

    original = StoreCore.disconnect

    def disconnect(self: Any, owner: Any) -> None:
        self._owners[owner].claims.clear()
        original(self, owner)

    return instead(StoreCore, "disconnect", disconnect)


def _epoch_not_checked_on_entry() -> contextlib.AbstractContextManager[None]:
    from pdserve.kvstore.masters import metadata

    def register(self: Any, member: Any) -> None:
        with self._transaction() as table:
            table.execute(
                "INSERT OR REPLACE INTO member VALUES (?, ?, ?)",
                (member.store_id, member.epoch, metadata._to_json(member)),
            )

    return instead(metadata.EmbeddedMetadata, "register", register)


def _epoch_not_checked_on_leaving() -> contextlib.AbstractContextManager[None]:
    from pdserve.kvstore.masters.metadata import EmbeddedMetadata

    def remove(self: Any, store_id: Any, epoch: int) -> None:
        with self._transaction() as table:
            table.execute("DELETE FROM member WHERE store_id = ?", (store_id,))

    return instead(EmbeddedMetadata, "remove", remove)


def _token_twice_after_a_retry() -> contextlib.AbstractContextManager[None]:
    from dataclasses import replace

    from pdserve.cluster.gateway.delivery import Delivery

    original = Delivery._accept

    def accept(self: Any, delta: Any) -> Any:
        return original(
            self, replace(delta, offset=len(self.tokens))
        )  # where it says that it begins

    return instead(Delivery, "_accept", accept)


def _gap_not_held() -> contextlib.AbstractContextManager[None]:
    from pdserve.cluster.gateway.session import GatewaySession

    original = GatewaySession._again

    def again(self: Any, delivery: Any) -> None:
        delivery.tokens = delivery.tokens[:-1]  # the last one is forgotten at a loss
        original(self, delivery)

    return instead(GatewaySession, "_again", again)


def _entry_lost_at_death() -> contextlib.AbstractContextManager[None]:
    from pdserve.router import endings

    def lose(*_: Any, **__: Any) -> list[Any]:
        return []  # neither forgotten nor told to anybody

    return instead(endings, "lose", lose)


def _gateway_not_told_of_a_loss() -> contextlib.AbstractContextManager[None]:
    from pdserve.router import endings
    from pdserve.router.commands import ToGateway

    original = endings.lose

    def lose(*args: Any, **named: Any) -> list[Any]:
        commands = original(*args, **named)
        return [each for each in commands if not isinstance(each, ToGateway)]

    return instead(endings, "lose", lose)


def _no_ageing() -> contextlib.AbstractContextManager[None]:
    from pdserve.router.orders.rescue import Rescue

    return instead(Rescue, "head", lambda self, now_ns: None)


def _silent_worker_never_comes_back() -> contextlib.AbstractContextManager[None]:
    from pdserve.router.core import RouterCore

    return instead(RouterCore, "knows", lambda self, worker: True)


def _new_router_changes_nothing() -> contextlib.AbstractContextManager[None]:
    from pdserve.cluster.gateway.session import GatewaySession

    return instead(GatewaySession, "reconnected", _nothing)


def _moves_hold_no_blocks() -> contextlib.AbstractContextManager[None]:
    from pdserve.engine.device import Device

    def submit(self: Any, move: Any, owner: object = None) -> None:
        self.mover.submit(move, owner)

    def offer(self: Any, move: Any) -> None:
        self.mover.offer(move)

    def collect(self: Any) -> Any:
        return self.mover.collect()

    @contextlib.contextmanager
    def all_three() -> Iterator[None]:
        with (
            instead(Device, "submit", submit),
            instead(Device, "offer", offer),
            instead(Device, "collect", collect),
        ):
            yield

    return all_three()


def _blocks_not_given_back() -> contextlib.AbstractContextManager[None]:
    from pdserve.decode.streams import Streams

    original = Streams._release

    def release(self: Any, stream: Any) -> None:
        if not self._draining and len(stream.sequence.blocks) > 3:
            stream.sequence.blocks.pop()  # one is forgotten
        original(self, stream)

    return instead(Streams, "_release", release)


def _salt_left_out() -> contextlib.AbstractContextManager[None]:
    """At gateways and at workers: a worker does not believe a gateway's keys that are not its own,
    so one of the two alone would only find less (``engine.sequence``)."""
    from pdserve.cluster.gateway import session
    from pdserve.engine import sequence
    from pdserve.kvstore import keys

    def block_keys(namespace: bytes, tokens: Any, block_tokens: int, *, tenant: str = "") -> Any:
        return keys.block_keys(namespace, tokens, block_tokens)

    def key_chain(namespace: bytes, block_tokens: int, *, tenant: str = "", **known: Any) -> Any:
        return keys.KeyChain(namespace, block_tokens, **known)

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with (
            instead(session, "block_keys", block_keys),
            instead(sequence, "KeyChain", key_chain),
        ):
            yield

    return both()


def _letters_not_repeated() -> contextlib.AbstractContextManager[None]:
    from pdserve.wire.postbox import _Outbox

    def unsent(self: Any) -> list[Any]:
        batch = list(self.letters)[self.sent_count :]
        for letter in batch:  # what was sent is taken for received
            self.letters.remove(letter)
        self.sent_count = -len(batch)
        return batch

    return instead(_Outbox, "unsent", unsent)


def _refused_letters_are_dropped() -> contextlib.AbstractContextManager[None]:
    from pdserve.cluster.worker_shell import WorkerShell
    from pdserve.errors import CapacityError

    def post(self: Any, address: Any, message: Any) -> None:
        with contextlib.suppress(CapacityError):
            self._postbox.post(address, message)

    return instead(WorkerShell, "_post", post)


def _deadlines_travel_as_instants() -> contextlib.AbstractContextManager[None]:
    from pdserve.wire import codec

    return instead(codec, "steady_unix_ms", lambda: 0)  # then all that is left is the instant


def _cancel_stays_in_the_router() -> contextlib.AbstractContextManager[None]:
    from pdserve.decode.streams import Streams

    return instead(Streams, "cancel", _nothing)


def _epoch_forgotten() -> contextlib.AbstractContextManager[None]:
    from pdserve.cluster.link import RouterLink

    original = RouterLink._note

    def note(self: Any, leading: Any, address: Any) -> None:
        original(self, leading, address)
        self._epoch = 0

    return instead(RouterLink, "_note", note)


def _resumed_and_forgotten() -> contextlib.AbstractContextManager[None]:
    from pdserve.router.state import RouterState

    original = RouterState.resume

    def resume(self: Any, entry: Any, decode: Any, now_ns: int) -> Any:
        handoff = original(self, entry, decode, now_ns)
        entry.resumed = None
        return handoff

    return instead(RouterState, "resume", resume)


def _leads_who_was_not_entered() -> contextlib.AbstractContextManager[None]:
    from pdserve.router import succession
    from pdserve.router.succession import Claim, Found, Lead, Term

    original = succession.next_doing

    def next_doing(done: Any, outcome: Any, own: Any) -> Any:
        match done, outcome:
            case (Claim(), Found(Term(epoch))):
                return Lead(epoch)
        return original(done, outcome, own)

    return instead(succession, "next_doing", next_doing)


def _nobody_succeeds() -> contextlib.AbstractContextManager[None]:
    from pdserve.router import succession
    from pdserve.router.succession import Gone, Look

    original = succession.next_doing

    def next_doing(done: Any, outcome: Any, own: Any) -> Any:
        return Look(again=True) if isinstance(outcome, Gone) else original(done, outcome, own)

    return instead(succession, "next_doing", next_doing)


def _deposed_and_leads_on() -> contextlib.AbstractContextManager[None]:
    from pdserve.router import succession
    from pdserve.router.succession import Lead

    original = succession.next_doing

    def next_doing(done: Any, outcome: Any, own: Any) -> Any:
        return done if isinstance(done, Lead) else original(done, outcome, own)

    return instead(succession, "next_doing", next_doing)


def _deaths_of_the_absent_count() -> contextlib.AbstractContextManager[None]:
    from pdserve.lifecycle import Phase
    from pdserve.router import suspicion

    def may_compute(entry: Any, worker: Any) -> bool:
        at = entry.prefill if entry.phase is Phase.PREFILLING else entry.decode
        return bool(at == worker)  # whether it has said so or not

    return instead(suspicion, "_may_compute", may_compute)


MUTANTS: tuple[Mutant, ...] = (
    Mutant("a preempted or failed prompt's ticket is not ended", _forgotten_ticket),
    Mutant("an ended ticket keeps its pins", _ticket_keeps_pins),
    Mutant("claims outlive the connection that held them", _claims_outlive_their_owner),
    Mutant("an older epoch may enter itself", _epoch_not_checked_on_entry),
    Mutant("an older epoch may remove its successor", _epoch_not_checked_on_leaving),
    Mutant("tokens repeated by a retry are delivered again", _token_twice_after_a_retry),
    Mutant("a retry forgets the last token that was delivered", _gap_not_held),
    Mutant("queue entries of a dead worker are left as they are", _entry_lost_at_death),
    Mutant("a gateway does not hear that a worker died", _gateway_not_told_of_a_loss),
    Mutant("nobody is rescued from the queue", _no_ageing),
    Mutant("a worker taken for lost is never asked to come again", _silent_worker_never_comes_back),
    Mutant("a gateway takes a new router for the old one", _new_router_changes_nothing),
    Mutant("a parked ticket is forgotten with whom it was sent to", _resumed_and_forgotten),
    Mutant("a link forgets of which epoch it has heard", _epoch_forgotten),
    Mutant("a router leads though another was entered", _leads_who_was_not_entered),
    Mutant("nobody succeeds a router that is gone", _nobody_succeeds),
    Mutant("a deposed router leads on", _deposed_and_leads_on),
    Mutant("moves do not hold the blocks they touch", _moves_hold_no_blocks),
    Mutant("a stream gives back one block too few", _blocks_not_given_back),
    Mutant("block keys leave out the tenant", _salt_left_out),
    Mutant("letters under way are not repeated on the next connection", _letters_not_repeated),
    Mutant("decode ignores cancellations", _cancel_stays_in_the_router),
    Mutant("what a full outbox does not take is dropped", _refused_letters_are_dropped),
    Mutant("deadlines travel as instants", _deadlines_travel_as_instants),
    Mutant("a death counts against whom the dead never had", _deaths_of_the_absent_count, TOGETHER),
)


def hunt(mutant: Mutant, *, seeds_max: int = SEEDS_MAX) -> Found:
    """Seeds from 0 on, until one shows the bug."""
    with mutant.plant():
        for seed in range(seeds_max):
            violation = _violation(seed, mutant.plan)
            if violation is not None:
                return Found(mutant.name, seed + 1, violation)
    return Found(mutant.name, 0, "")


def _violation(seed: int, plan: Plan | None) -> str | None:
    try:
        return simulate(seed, plan=plan).violation
    except Exception as error:  # a bug may break anything
        return f"{type(error).__name__}: {error}"
