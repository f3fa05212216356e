"""Who is guilty of a worker's death: found after two deaths, or three in company."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.clock import MS
from pdserve.cluster.gateway.poison import Suspicion
from pdserve.errors import ErrorInfo, StepFailed
from pdserve.ids import RequestId, WorkerId
from pdserve.lifecycle import Event
from pdserve.messages import Attained, Lost, Report, Request, WorkerFailed
from pdserve.router.core import Command, RouterCore
from pdserve.suspicion import PROGRESS_TOKENS, alone_in_step, is_alone
from tests.unit.router.build import core_with, hello, request, settings


def _lost(commands: list[Command]) -> dict[str, tuple[bool, bool]]:
    return {
        str(c.message.request): (c.message.implicated, c.message.alone)
        for c in commands
        if isinstance(c.message, Lost)
    }


def _again(asked: Request, deaths: int, *, emitted: int = 0) -> Request:
    return replace(
        asked,
        attempt=asked.attempt + 1,
        deaths=deaths,
        tokens=(*asked.tokens, *range(emitted)),
    )


def _vouch(core: RouterCore, name: str) -> None:
    """As a worker does for every request with deaths that it is sent."""
    worker = core.state.fleet.get(WorkerId(name))
    assert worker is not None
    here = tuple(
        Attained(entry.id, entry.request.attempt, entry.request.emitted_count)
        for entry in core.state.entries.values()
        if name in (entry.prefill, entry.decode) and entry.request.deaths
    )
    sequence = 0 if worker.next_sequence is None else worker.next_sequence
    core.on_report(Report(worker.id, sequence, False, 0, 0, worker.free_blocks, attained=here), 0)


# ── counting ─────────────────────────────────────────────────────────────────────────────────────


def test_deaths_count_in_one_place() -> None:
    suspicion = Suspicion()
    for delivered, deaths in ((0, 1), (PROGRESS_TOKENS, 2), (PROGRESS_TOKENS + 1, 1), (30, 1)):
        suspicion.implicated(delivered)
        assert suspicion.deaths == deaths, delivered
    assert not suspicion.is_guilty(alone=True)
    suspicion.implicated(30)
    assert suspicion.is_guilty(alone=True)
    assert not suspicion.is_guilty(alone=False)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_at_most_one_of_those_who_died_before_is_alone(deaths: list[int]) -> None:
    alone = alone_in_step(deaths)
    guilty = [count for count, each in zip(deaths, alone, strict=True) if each and count > 0]
    assert len(guilty) <= 1
    assert all(count == max(deaths) for count in guilty)
    assert alone == [
        is_alone(count, deaths[:index] + deaths[index + 1 :]) for index, count in enumerate(deaths)
    ]


# ── the router ───────────────────────────────────────────────────────────────────────────────────


def test_a_death_implicates_whom_the_worker_computed() -> None:
    core, _ = core_with(hello("p0"), hello("p1"), hello("d0"))
    for name in ("a", "b", "c"):
        core.on_submit(request(name, 100), 0)
    at_p0 = [
        name for name in ("a", "b", "c") if core.state.entries[RequestId(name)].prefill == "p0"
    ]
    assert at_p0
    lost = _lost(core.on_worker_lost(WorkerId("p0"), 0))
    assert lost == dict.fromkeys(at_p0, (True, True))


def test_who_hangs_up_after_a_goodbye_died_of_nothing() -> None:
    core, _ = core_with(hello("p0"), hello("d0"))
    core.on_submit(request("a", 100), 0)
    assert _lost(core.on_worker_lost(WorkerId("p0"), 0, left=True)) == {"a": (False, False)}


def test_silence_accuses_nobody() -> None:
    """A process that somebody has stopped, a host that is starved or cut off: none of it is a
    request's doing. Whose engine hangs says so itself, and hangs up."""
    core, (_, d0) = core_with(hello("p0"), hello("d0"), config=settings(worker_silence_ms=3000))
    core.on_submit(request("a", 100), 0)
    d0.report(now_ns=1 * MS)
    assert _lost(core.on_tick(3000 * MS)) == {"a": (False, False)}
    assert not core.knows(WorkerId("p0"))


def test_beside_one_with_as_many_deaths_nobody_is_alone() -> None:
    core, _ = core_with(hello("p0", chunk_tokens=640), hello("d0"))
    for name, deaths, emitted in (("a", 1, 3), ("b", 1, 3), ("c", 0, 0)):
        core.on_submit(_again(request(name, 50), deaths, emitted=emitted), 0)
    _vouch(core, "p0")
    assert _lost(core.on_worker_lost(WorkerId("p0"), 0)) == {
        "a": (True, False),
        "b": (True, False),
        "c": (True, False),
    }


def test_of_a_further_death_nobody_is_suspected_whom_the_worker_may_not_have_had() -> None:
    core, _ = core_with(hello("p0", chunk_tokens=640), hello("d0"))
    core.on_submit(_again(request("a", 50), 1), 0)
    core.on_submit(request("b", 50), 0)
    assert _lost(core.on_worker_lost(WorkerId("p0"), 0)) == {"a": (False, False), "b": (True, True)}


def test_who_was_preempted_has_to_be_vouched_for_anew() -> None:
    core, (p0, _) = core_with(hello("p0"), hello("d0"))
    asked = _again(request("a", 50), 1)
    core.on_submit(asked, 0)
    _vouch(core, "p0")
    assert core.state.entries[asked.request].vouched_by == ("p0",)
    p0.event(asked, Event.PREEMPTED)
    entry = core.state.entries[asked.request]
    assert entry.prefill == "p0", "it goes back there: nobody else is"
    assert entry.vouched_by == ()


@given(st.data())
def test_nobody_is_refused_for_workers_that_die_together(data: st.DataObject) -> None:
    """The router hears of them one after the other, and in between whoever was on one is sent to
    another, which is gone and says nothing."""
    names = [f"p{index}" for index in range(data.draw(st.integers(2, 5)))]
    core, _ = core_with(*(hello(name, chunk_tokens=640) for name in names), hello("d0"))
    asked = {name: request(name, 50) for name in "abc"[: data.draw(st.integers(1, 3))]}
    suspicions = {name: Suspicion() for name in asked}
    for each in asked.values():
        core.on_submit(each, 0)
    for worker in data.draw(st.permutations(names)):
        for command in core.on_worker_lost(WorkerId(worker), 0):
            if not isinstance(command.message, Lost):
                continue
            lost, name = command.message, str(command.message.request)
            if lost.implicated:
                suspicions[name].implicated(0)
            assert not (lost.implicated and suspicions[name].is_guilty(alone=lost.alone))
            asked[name] = _again(asked[name], suspicions[name].deaths)
            core.on_submit(asked[name], 0)
        core.state.check()
    assert all(suspicion.deaths <= 1 for suspicion in suspicions.values())


def test_of_suspects_without_a_token_one_is_prefilled_at_a_time() -> None:
    core, _ = core_with(hello("p0", chunk_tokens=640), hello("p1"), hello("d0"))
    core.on_submit(_again(request("a", 50), 1), 0)
    core.on_submit(_again(request("b", 50), 1), 0)
    core.on_submit(request("c", 50), 0)
    assert sorted(p for p in ("a", "b", "c") if core.state.entries[RequestId(p)].prefill) == [
        "a",
        "c",
    ]
    core.on_cancel(RequestId("a"), 0)
    assert core.state.entries[RequestId("b")].prefill
    core.state.check()


def test_of_those_who_died_twice_one_runs_at_a_time() -> None:
    core, _ = core_with(hello("p0", chunk_tokens=640), hello("d0"))
    for name in ("a", "b"):
        core.on_submit(_again(request(name, 50), 2, emitted=5), 0)
    core.on_submit(_again(request("c", 50), 1, emitted=5), 0)
    running = [name for name in ("a", "b", "c") if core.state.entries[RequestId(name)].prefill]
    assert running == ["a", "c"]
    core.on_cancel(core.state.entries[RequestId("a")].id, 0)
    assert core.state.entries[RequestId("b")].prefill


def test_a_step_that_raised_implicates_as_its_worker_says() -> None:
    core, _ = core_with(hello("p0"), hello("d0"))
    core.on_submit(request("a", 100), 0)
    error = ErrorInfo.of(StepFailed("no room"))
    asked = core.state.entries[RequestId("a")].request
    failed = WorkerFailed(asked.request, 0, error, alone=True)
    assert _lost(core.on_failed(failed, WorkerId("p0"), 0)) == {"a": (True, True)}


# ── a whole trial ────────────────────────────────────────────────────────────────────────────────


class _Trial:
    """One worker computes everything; it dies whenever it has computed the guilty one. The gateway
    is the real one's arithmetic; innocents deliver some tokens between two deaths, or none."""

    def __init__(self, innocent: int, chance: random.Random) -> None:
        self.chance = chance
        self.suspicions = {f"r{index}": Suspicion() for index in range(innocent + 1)}
        self.delivered = dict.fromkeys(self.suspicions, 0)
        self.guilty = chance.choice(sorted(self.suspicions))
        self.requests = {name: request(name, 40) for name in self.suspicions}
        self.convicted: list[str] = []
        self.deaths = 0

    def run(self) -> None:
        core = RouterCore(core_with()[0].state.settings, unix_zero_ms=0)
        core.on_hello(hello("p0", chunk_tokens=4000), 0)
        core.on_hello(hello("d0"), 0)
        for asked in self.requests.values():
            core.on_submit(asked, 0)
        while not self.convicted and self.deaths < 6:
            self._until_the_guilty_runs(core)
            _vouch(core, "p0")
            self.deaths += 1
            again = []
            for command in core.on_worker_lost(WorkerId("p0"), 0):
                if isinstance(command.message, Lost):
                    again += self._heard(command.message)
            core.on_hello(hello("p0", chunk_tokens=4000), 0)
            for asked in again:
                core.on_submit(asked, 0)
            core.state.check()

    def _until_the_guilty_runs(self, core: RouterCore) -> None:
        """Whoever else is on the worker first may be done by then."""
        for _ in range(50):
            entry = core.state.entries[self.requests[self.guilty].request]
            if entry.prefill is not None:
                return
            running = [e for e in core.state.entries.values() if e.prefill is not None]
            assert running, "the guilty one waits for nobody"
            core.on_cancel(running[0].id, 0)
        raise AssertionError("the guilty one never runs")

    def _heard(self, lost: Lost) -> list[Request]:
        name = str(lost.request)
        suspicion = self.suspicions[name]
        if lost.implicated:
            if name != self.guilty and self.chance.random() < 0.5:
                self.delivered[name] += PROGRESS_TOKENS + 1
            suspicion.implicated(self.delivered[name])
            if suspicion.is_guilty(alone=lost.alone):
                self.convicted.append(name)
                return []
        asked = _again(self.requests[name], suspicion.deaths)
        self.requests[name] = asked
        return [asked]


@pytest.mark.parametrize("innocent", [0, 1, 3, 8])
@given(seed=st.integers(0, 10_000))
def test_the_guilty_one_is_found_and_nobody_else(innocent: int, seed: int) -> None:
    trial = _Trial(innocent, random.Random(seed))
    trial.run()
    assert trial.convicted == [trial.guilty]
    assert trial.deaths <= 3
