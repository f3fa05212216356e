"""What happens to a cluster, drawn from the seed: when, what, to whom and for how long."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pdserve.clock import MS, US, S
from pdserve.lifecycle import Phase
from tests.simulation.shape import HOUR_MS, WORKER_SILENCE_MS
from tests.simulation.store import StoreNode
from tests.simulation.world import Place, World

HANG_NS = 2 * S
"""Longer than a router may be silent, and shorter than until a leader looks who leads."""


BOOT_NS = (3 * S, 6 * S)
"""Of a host: longer than a worker may be silent."""

SILENT_NS = (WORKER_SILENCE_MS * MS + 200 * MS, WORKER_SILENCE_MS * MS + 2 * S)
"""Longer than a worker may be silent, and shorter than until a kernel ends its connection."""

LASTING_NS = SILENT_NS[1]
"""At most, beyond the load and what lingers."""


@dataclass(frozen=True, slots=True)
class Fault:
    at_ns: int
    kind: str
    span_ns: int  # for what ends by itself


def drawn(dice: random.Random, *, span_ns: int) -> list[Fault]:
    count = dice.choice((1, 2, 3, 4, 6))
    kinds = dice.choices(tuple(KINDS), weights=[weight for weight, _ in KINDS.values()], k=count)
    faults = [
        Fault(dice.randrange(10 * MS, span_ns), kind, dice.randrange(50 * MS, 5 * S))
        for kind in kinds
    ]
    return sorted(faults, key=lambda fault: (fault.at_ns, fault.kind))


def with_one(faults: list[Fault], kind: str, at_ns: int) -> list[Fault]:
    return sorted([*faults, Fault(at_ns, kind, S)], key=lambda fault: (fault.at_ns, fault.kind))


def strike(world: World, fault: Fault) -> None:
    _, action = KINDS[fault.kind]
    action(world, fault.span_ns)


def _some(world: World, *prefixes: str) -> Place | None:
    found = [place for prefix in prefixes for place in world.alive(prefix)]
    return world.dice.choice(found) if found else None


def _kill(*prefixes: str) -> Callable[[World, int], None]:
    def kill(world: World, _: int) -> None:
        place = _some(world, *prefixes)
        if place is not None:
            world.kill(place)

    return kill


def _kill_leader(world: World, _: int) -> None:
    for place in world.leaders():
        world.kill(place)


def _power_off(world: World, _: int, *, tries: int = 200) -> None:
    """A host is gone, and nobody is told: its peers hear nothing more, and find out one after the
    other. Where no worker computes anything it looks again a little later."""
    if len(world.hosts) < 2 or world.is_healed:
        return
    busy = [
        place.host
        for place in world.places.values()
        if place.process.alive and (engine := world.engines.get(place.process)) and engine.is_busy
    ]
    if not busy:
        if tries:
            later_ns = world.loop.now_ns + world.dice.randrange(MS, 5 * MS)
            world.loop.at(later_ns, lambda: _power_off(world, 0, tries=tries - 1), None)
        return
    host = world.dice.choice(busy)
    world.note(f"POWER OFF {host}")
    world.network.cut_off(host)
    back_ns = world.loop.now_ns + world.dice.randrange(*BOOT_NS)
    for place in [place for place in world.places.values() if place.host == host]:
        world.kill(place)
        if not place.restarting:
            place.restarting = True
            world.loop.at(back_ns, partial(world.restart, place), None)


def _kill_together(world: World, _: int) -> None:
    """All workers of a host at once, as where the daemon above them ends."""
    host = world.dice.choice(world.hosts)
    for place in [*world.alive("prefill"), *world.alive("decode")]:
        if place.host == host:
            world.kill(place)


def _kill_resuming(world: World, _: int, *, tries: int = 2_000) -> None:
    """Of a request that another worker has parked, the one who is to take it up: it has been sent
    the ticket, nobody has used that, and it outlives who was to. Where nothing is on such a way it
    looks again a little later."""
    if world.is_healed:
        return
    for leader in world.leaders():
        entries = leader.what._core.state.entries
        for request, writer in world.parked():
            entry = entries.get(request)
            if entry is None or entry.phase is not Phase.HANDING_OFF or entry.decode == writer:
                continue
            place = world.place_of(entry.decode)
            if place is not None and place.process.alive:
                world.kill(place)
                return
    if tries:
        later_ns = world.loop.now_ns + world.dice.randrange(100 * US, 400 * US)
        world.loop.at(later_ns, lambda: _kill_resuming(world, 0, tries=tries - 1), None)


def _stop(world: World, span_ns: int) -> None:
    place = _some(world, "")
    if place is not None:
        _stop_one(world, place, span_ns)


def _stop_gateway(world: World, span_ns: int) -> None:
    """For long, while workers go on telling it: longer than anybody keeps all of that."""
    place = _some(world, "gateway")
    if place is not None:
        _stop_one(world, place, 4 * span_ns)


def _stop_leader(world: World, span_ns: int) -> None:
    for place in world.leaders():
        _stop_one(world, place, span_ns)


def _stop_one(world: World, place: Place, span_ns: int) -> None:
    if place.process.stopped:
        return
    process = place.process
    world.note(f"STOP {process} for {span_ns // MS} ms")
    world.loop.stop_process(process)

    def go_on() -> None:
        if process.alive and process.stopped:
            world.note(f"CONT {process}")
            world.loop.continue_process(process)

    world.loop.at(world.loop.now_ns + span_ns, go_on, None)


def _partition(world: World, span_ns: int) -> None:
    if len(world.hosts) < 2:
        return
    one, other = world.dice.sample(world.hosts, 2)
    both = world.dice.random() < 0.5
    if world.dice.random() < 0.15:
        span_ns += 10 * S  # long enough for connections to end
    until_ns = world.loop.now_ns + span_ns
    world.note(f"PARTITION {one} {'<->' if both else '->'} {other} for {span_ns // MS} ms")
    world.network.block(one, other, until_ns)
    if both:
        world.network.block(other, one, until_ns)


def _fall_silent(world: World, _: int) -> None:
    """A worker is not heard for so long that the router takes it for lost; its connection stays,
    and nobody but the router can tell it. It hangs; or what it says does not come through, while
    it hears everything."""
    place = _some(world, "prefill", "decode")
    if place is None or place.process.stopped:
        return
    span_ns = world.dice.randrange(*SILENT_NS)
    deaf = [leader.host for leader in world.leaders() if leader.host != place.host]
    if deaf and world.dice.random() < 0.5:
        world.note(f"PARTITION {place.host} -> {deaf[0]} for {span_ns // MS} ms")
        world.network.block(place.host, deaf[0], world.loop.now_ns + span_ns)
    else:
        _stop_one(world, place, span_ns)
    world.lasting_ns = max(world.lasting_ns, world.loop.now_ns + span_ns)


def _slow_network(world: World, span_ns: int) -> None:
    world.network.slow_ns = world.dice.choice((50, 200, 500)) * MS
    world.network.slow_until_ns = world.loop.now_ns + span_ns
    world.note(f"SLOW network, up to {world.network.slow_ns // MS} ms, for {span_ns // MS} ms")


def _reset(world: World, _: int) -> None:
    for _ in range(world.dice.randrange(1, 5)):
        world.network.reset_one(world.note)


def _repeat(world: World, _: int, *, tries: int = 1_000) -> None:
    """A listener forgets what it has received, as of more posters than it remembers, just when the
    connections break over which it came, and receipts with them: what has none comes twice. Where
    nothing is under way it looks again a little later."""
    if world.is_healed:
        return
    awaited = world.awaiting_receipts()
    if awaited:
        place = world.dice.choice(awaited)
        world.note(f"REPEAT to {place.process}")
        world.network.break_all_to(place.process)
        place.what._listener._received.clear()
    elif tries:
        later_ns = world.loop.now_ns + world.dice.randrange(100 * US, 400 * US)
        world.loop.at(later_ns, lambda: _repeat(world, 0, tries=tries - 1), None)


def _corrupt(world: World, _: int) -> None:
    place = _some(world, "store")
    if place is not None and isinstance(place.what, StoreNode):
        world.note(f"CORRUPT {place.name}: {place.what.flip_bit(world.dice)}")


def _succeed(world: World, span_ns: int) -> None:
    """A node hangs, is replaced, and comes back: it must neither be believed nor undo anything."""
    place = _some(world, "store")
    if place is None or place.process.stopped or place.restarting:
        return
    old: StoreNode = place.what
    zombie = place.process
    world.note(f"SUCCEED {zombie}")
    world.loop.stop_process(zombie)
    world.restart(place)

    def come_back() -> None:
        if world.membership.speaks(old.member):
            raise AssertionError(f"I7: {zombie} is believed under epoch {old.member.epoch}")
        world.membership.master.leave(old.member)
        world.membership.check_entry(place.what.member)
        world.note(f"{zombie} has been refused, and ends")
        world.loop.kill_process(zombie)

    world.loop.at(world.loop.now_ns + min(span_ns, S), come_back, None)


def _full(world: World, span_ns: int) -> None:
    place = _some(world, "store")
    if place is None:
        return
    node: StoreNode = place.what
    node.is_full = True
    world.note(f"FULL {place.name} for {span_ns // MS} ms")

    def drain() -> None:
        node.is_full = False

    world.loop.at(world.loop.now_ns + span_ns, drain, None)


def _slow_worker(world: World, span_ns: int) -> None:
    place = _some(world, "prefill", "decode")
    engine = None if place is None else world.engines.get(place.process)
    if place is None or engine is None:
        return
    engine.slow = world.dice.choice((5, 50))
    world.note(f"SLOW {place.process}, {engine.slow} times, for {span_ns // MS} ms")

    def recover() -> None:
        engine.slow = 1

    world.loop.at(world.loop.now_ns + span_ns, recover, None)


def _jump(world: World, _: int) -> None:
    """A host's clock is set: whoever begins there from now on believes it."""
    host = world.dice.choice(world.hosts)
    by_ms = world.dice.choice((-HOUR_MS, HOUR_MS))
    world.clocks[host].offset_ms += by_ms
    world.note(f"JUMP {host} by {by_ms // 60_000} minutes")


def _two_leaders(world: World, span_ns: int) -> None:
    """A leader hangs until it is succeeded, and comes back while the register says nothing to it;
    before it has heard of its successor that one dies. Whoever the successor led finds the old one,
    which must not take them so: that it has been deposed it can learn from nobody else."""
    leaders = world.leaders()
    if len(leaders) != 1 or world.shape.routers < 2:
        return
    old = leaders[0]
    _stop_one(world, old, HANG_NS)
    back_ns = world.loop.now_ns + HANG_NS
    dies_ns = back_ns + 1 + span_ns // 10

    def silence_register() -> None:
        if not world.is_healed:
            world.register.down_until_ns = dies_ns + S

    def kill_successor() -> None:
        if not world.is_healed:
            for place in world.leaders():
                if place is not old:
                    world.kill(place)

    world.loop.at(back_ns - MS, silence_register, None)
    world.loop.at(dies_ns, kill_successor, None)


def _no_register(world: World, span_ns: int) -> None:
    world.register.down_until_ns = world.loop.now_ns + span_ns
    world.note(f"DOWN register, for {span_ns // MS} ms")


def _drain(world: World, _: int) -> None:
    place = _some(world, "prefill", "decode")
    if place is None or place.process.stopped:
        return
    world.note(f"DRAIN {place.process}")

    async def drain() -> None:
        process = place.process
        await place.what.drain(timeout_s=10.0)
        if place.process is process and process.alive:
            world.leave(place)

    world.loop.spawn(place.process, drain())


KINDS: dict[str, tuple[int, Callable[[World, int], None]]] = {
    "kill worker": (6, _kill("prefill", "decode")),
    "kill router": (1, _kill("router")),
    "kill leader": (2, _kill_leader),
    "stop leader": (2, _stop_leader),
    "two leaders": (2, _two_leaders),
    "register": (1, _no_register),
    "kill gateway": (1, _kill("gateway")),
    "stop gateway": (2, _stop_gateway),
    "kill store": (2, _kill("store")),
    "stop": (4, _stop),
    "fall silent": (2, _fall_silent),
    "partition": (4, _partition),
    "slow network": (2, _slow_network),
    "reset": (5, _reset),
    "repeat": (3, _repeat),
    "corrupt": (3, _corrupt),
    "kill reader": (2, _kill("reader")),
    "succeed": (2, _succeed),
    "full": (1, _full),
    "slow worker": (2, _slow_worker),
    "clock": (1, _jump),
    "drain": (2, _drain),
    "power off": (2, _power_off),
    "kill together": (2, _kill_together),
    "kill resuming": (1, _kill_resuming),
}
