"""Routers, gateways' and workers' links on real sockets; the register is a dictionary, and no Ray.

The links are of persons who write down what they hear. A router dies by closing its listener, and
hangs by saying nothing more.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.cluster.link import RouterLink
from pdserve.cluster.router_service import RouterService
from pdserve.cluster.terms import MemoryTerms
from pdserve.errors import MessageTooLarge, StoreUnavailable
from pdserve.ids import HostId, RequestId, WorkerId
from pdserve.messages import (
    Address,
    Cancel,
    Dispatch,
    Following,
    GatewayHello,
    Leading,
    Refused,
    Route,
    Seek,
    Timing,
)
from pdserve.router.core import ToWorker
from pdserve.router.succession import Term
from pdserve.router_config import RouterConfig
from pdserve.wire.connection import Connection, connect
from pdserve.wire.frame import MESSAGE_BYTES_MAX
from pdserve.wire.listener import Listener
from tests.unit.router.build import request

HOST = HostId("here")
PATIENCE_S = 60.0
NEVER_MS = 600_000


class FakeRegister(MemoryTerms):
    is_down = False

    async def latest(self) -> Term | None:
        if self.is_down:
            raise StoreUnavailable("down")
        return await super().latest()

    async def claim(self, term: Term) -> Term | None:
        if self.is_down:
            raise StoreUnavailable("down")
        return await super().claim(term)


class Listening:
    """A gateway, as far as its link knows."""

    def __init__(self, name: str) -> None:
        self.address = Address(HOST, name, "")
        self.again_count = 0
        self.heard: list[Refused] = []

    def hello(self) -> GatewayHello:
        return GatewayHello(self.address)

    def hear(self, message: object) -> None:
        assert isinstance(message, Refused), f"nobody says {message} to it"
        self.heard.append(message)

    def reconnected(self) -> None:
        self.again_count += 1


class Routers:
    """Some that serve a register, in a directory."""

    def __init__(self, directory: Path, *, silence_ms: int = NEVER_MS) -> None:
        self.directory = directory
        self.register = FakeRegister()
        self.running: list[RouterService] = []
        self._settings = RouterConfig(router_silence_ms=silence_ms)
        self._silence_s = silence_ms / 1000
        self._links: list[RouterLink] = []

    async def start(self) -> RouterService:
        router = RouterService(
            self._settings,
            host=HOST,
            register=self.register,
            answer=lambda question, argument: f"{question} {argument} {router.address.unix_path}",
        )
        await router.start(self.directory, tcp_host=None)
        self.running.append(router)
        return router

    async def kill(self, router: RouterService) -> None:
        """As a dead process: nobody listens, and its connections are closed."""
        self.running.remove(router)
        await router.close()

    async def link(self, person: Listening) -> RouterLink:
        async def find_router() -> Address:
            return self.running[0].address

        link = RouterLink(person, find_router=find_router, host=HOST, silence_s=self._silence_s)
        await link.start(timeout_s=PATIENCE_S)
        self._links.append(link)
        return link

    async def leader(self) -> RouterService:
        await until(lambda: any(router.leads for router in self.running))
        (leader,) = [router for router in self.running if router.leads]
        return leader

    async def standing_by(self) -> tuple[RouterService, RouterService]:
        """The leader and its standby, once each knows of the other."""
        await self.start()
        await self.start()
        leader = await self.leader()
        standby = next(router for router in self.running if router is not leader)
        candidate = leader.candidate
        await until(lambda: len(candidate.standbys) == 1)
        return leader, standby

    async def end(self) -> None:
        for link in self._links:
            await link.close()
        for router in self.running:
            await router.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


def play(routers: Routers, scenario: Callable[[Routers], Awaitable[None]]) -> None:
    async def whole() -> None:
        try:
            await scenario(routers)
        finally:
            await routers.end()

    asyncio.run(whole())


def test_the_standby_takes_over_and_everybody_finds_it(tmp_path: Path) -> None:
    async def scenario(routers: Routers) -> None:
        leader, standby = await routers.standing_by()
        people = [Listening(f"g{index}") for index in range(3)]
        links = [await routers.link(person) for person in people]
        await routers.kill(leader)
        await until(lambda: standby.leads)
        await until(lambda: all(person.again_count == 1 for person in people))
        assert all(link.connected for link in links)
        assert sorted(routers.register.terms) == [1, 2]

    play(Routers(tmp_path), scenario)


def test_a_router_that_hangs_is_left_and_finds_itself_deposed(tmp_path: Path) -> None:
    """Its connections stand, and it says nothing: an epoch later it hears that it was succeeded."""

    async def scenario(routers: Routers) -> None:
        leader, standby = await routers.standing_by()
        person = Listening("g")
        await routers.link(person)
        leader.say_to_all = lambda message: None  # type: ignore[method-assign]
        await until(lambda: standby.leads)
        await until(lambda: person.again_count >= 1)
        await until(lambda: not leader.leads)
        await until(lambda: leader.candidate.leader is not None)

    play(Routers(tmp_path, silence_ms=1500), scenario)


def test_whoever_has_heard_of_a_younger_epoch_takes_nothing_from_an_older_one(
    tmp_path: Path,
) -> None:
    async def scenario(routers: Routers) -> None:
        old = await routers.start()
        await until(lambda: old.leads)
        person = Listening("g")
        link = await routers.link(person)
        link._note(Leading(7, ()), old.address)  # it has been elsewhere
        routers.register.terms[7] = Address(HOST, str(tmp_path / "nobody"), "")
        for peer in list(old._gateways.values()):
            await peer.hang_up()
        await until(lambda: person.again_count == 1)
        assert sorted(routers.register.terms) == [1, 7, 8], "it led again in an epoch of its own"
        assert link._epoch == 8

    play(Routers(tmp_path), scenario)


def test_a_link_leaves_a_router_that_says_it_leads_in_an_older_epoch(tmp_path: Path) -> None:
    """Whatever that router believes: the link has been told better, and says hello to the other."""

    async def deposed(connection: Connection) -> None:
        while True:
            frame = await connection.receive()
            assert isinstance(frame.message, Seek), f"it was told {frame.message}"
            await connection.answer(frame, Leading(3, ()))

    async def scenario(routers: Routers) -> None:
        routers.register.terms[6] = Address(HOST, str(tmp_path / "nobody"), "")
        right = await routers.start()
        await until(lambda: right.leads)
        wrong = await Listener.open(tmp_path, "deposed", host=HOST, serve=deposed)
        person = Listening("g")
        link = await routers.link(person)
        assert link._epoch == 7
        link._known = [wrong.address]
        for peer in list(right._gateways.values()):
            await peer.hang_up()
        await until(lambda: person.again_count == 1)
        assert link._epoch == 7
        await wrong.close()

    play(Routers(tmp_path), scenario)


def test_a_leader_that_hears_of_a_younger_epoch_says_so_and_steps_down(tmp_path: Path) -> None:
    async def scenario(routers: Routers) -> None:
        leader = await routers.start()
        await until(lambda: leader.leads)
        routers.register.is_down = True  # so that it hears of it in no other way
        connection = await connect(leader.address, host=HOST)
        frame = await connection.call(Seek(9), timeout_s=PATIENCE_S)
        assert frame.message == Following(9, None)
        await connection.close()
        await until(lambda: not leader.leads)

    play(Routers(tmp_path), scenario)


def test_questions_to_a_standby_are_the_leaders_to_answer(tmp_path: Path) -> None:
    async def scenario(routers: Routers) -> None:
        leader, standby = await routers.standing_by()
        for router in (leader, standby):
            assert await router.ask("who", "leads") == f"who leads {leader.address.unix_path}"

    play(Routers(tmp_path), scenario)


def test_a_leader_goes_on_without_the_register(tmp_path: Path) -> None:
    async def scenario(routers: Routers) -> None:
        leader, standby = await routers.standing_by()
        routers.register.is_down = True
        person = Listening("g")
        await routers.link(person)
        assert leader.leads
        await routers.kill(leader)
        late = asyncio.create_task(until(lambda: person.again_count == 1))
        await asyncio.sleep(0)
        assert not standby.leads, "an epoch is not taken without the register"
        routers.register.is_down = False
        await late
        assert standby.leads

    play(Routers(tmp_path), scenario)


def test_a_standby_takes_no_hello(tmp_path: Path) -> None:
    async def scenario(routers: Routers) -> None:
        _, standby = await routers.standing_by()
        connection = await connect(standby.address, host=HOST)
        await connection.send(GatewayHello(Address(HOST, "g", "")))
        with pytest.raises(Exception, match="gone"):
            await connection.receive()
        assert standby._gateways == {}

    play(Routers(tmp_path), scenario)


def test_who_begins_anew_is_lost_to_the_router_and_comes_again(tmp_path: Path) -> None:
    """What waited is not said: it was of a state that the router is told anew."""

    async def scenario(routers: Routers) -> None:
        router = await routers.start()
        person = Listening("g")
        link = await routers.link(person)
        await until(lambda: person.address in router._gateways)
        link.post(Cancel(RequestId("nobody")))
        link.begin_anew()
        await until(lambda: person.again_count == 1)
        link.post(Cancel(RequestId("nobody either")))
        await until(lambda: router._core.state.counters["stale_cancels"] == 1)
        assert list(router._gateways) == [person.address]

    play(Routers(tmp_path), scenario)


# ── messages that no frame can carry ─────────────────────────────────────────────────────────────


def test_what_a_link_cannot_send_is_its_senders_error_and_the_link_lives_on(tmp_path: Path) -> None:
    async def scenario(routers: Routers) -> None:
        router = await routers.start()
        person = Listening("g")
        link = await routers.link(person)
        for post in (link.post, link.post_now):
            with pytest.raises(MessageTooLarge, match="send less at once"):
                post(Cancel(RequestId("x" * (MESSAGE_BYTES_MAX + 1))))
            link.post(Cancel(RequestId("nobody")))
        await until(lambda: router._core.state.counters["stale_cancels"] == 2)
        assert link.connected
        assert person.again_count == 0

    play(Routers(tmp_path), scenario)


def test_a_request_that_no_worker_can_be_told_of_is_refused_and_its_worker_stays(
    tmp_path: Path,
) -> None:
    async def scenario(routers: Routers) -> None:
        router = await routers.start()
        person = Listening("g")
        link = await routers.link(person)
        await until(lambda: person.address in router._gateways)
        worker = WorkerId("p-1")
        router._workers[worker] = router._gateways[person.address]
        large = replace(
            request("r-1", tokens=8, tenant="x" * MESSAGE_BYTES_MAX), reply_to=person.address
        )
        route = Route(worker, worker, person.address, None)
        router._carry_out([ToWorker(worker, Dispatch(large, route, Timing()))])
        await until(lambda: bool(person.heard))
        (refused,) = person.heard
        assert refused.request == "r-1"
        assert isinstance(refused.error.to_error(), MessageTooLarge)
        assert link.connected
        assert person.again_count == 0

    play(Routers(tmp_path), scenario)
