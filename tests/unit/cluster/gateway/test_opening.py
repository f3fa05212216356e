"""Models that come and go beside the first one of a gateway; sessions and routers are fakes."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, cast

import pytest

from pdserve.cluster.gateway import opening
from pdserve.cluster.gateway.front import Front
from pdserve.cluster.gateway.opening import FurtherModels, follow_blocks
from pdserve.config import ClusterConfig
from pdserve.errors import ConfigError
from pdserve.settings import from_tree, further_models, to_tree

TURNS_MAX = 10_000


class FakeRouterHandle:
    """Says what its workers' blocks are called, as a Serve handle does."""

    def __init__(self) -> None:
        self.said = "aa"
        self.snapshot = self.recording = self.scaling = self.observations = self

    def __getattr__(self, name: str) -> Any:  # ``namespace`` and ``assign``
        return self

    async def remote(self) -> str:
        return self.said


class FakeSession:
    def __init__(self, name: str, identity: str) -> None:
        self.model_name = name
        self.identity = identity
        self.in_flight = 0
        self.is_open = True

    def know_blocks_as(self, identity: str) -> None:
        self.identity = identity

    async def close(self) -> None:
        self.is_open = False


class FakeFront:
    def __init__(self) -> None:
        self.served: dict[str, FakeSession] = {}
        self.log: list[str] = []

    def add_model(self, session: FakeSession, config: Any, control: Any) -> None:
        if session.model_name == "taken":
            raise ConfigError("two models are called taken")
        assert session.model_name not in self.served
        self.served[session.model_name] = session
        self.log.append(f"+{session.model_name}")

    def remove_model(self, name: str) -> None:
        del self.served[name]
        self.log.append(f"-{name}")


class Stage:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.front = FakeFront()
        self.routers: dict[str, FakeRouterHandle] = {}
        self.failing: set[str] = set()
        self.opened: list[FakeSession] = []
        self.further = FurtherModels(cast(Front, self.front), "app")
        monkeypatch.setattr(opening, "AGAIN_S", 0.0)
        monkeypatch.setattr(opening, "IDLE_CHECK_S", 0.0)
        monkeypatch.setattr(opening, "open_session", self._open)
        monkeypatch.setattr("ray.serve.get_deployment_handle", self._handle)

    async def _open(self, config: ClusterConfig, router: FakeRouterHandle) -> FakeSession:
        name = str(config.model.served_name)
        if name in self.failing:
            raise ConfigError("no such file")
        session = FakeSession(name, await router.remote())
        self.opened.append(session)
        return session

    def _handle(self, deployment: str, app: str) -> FakeRouterHandle:
        assert app == "app"
        return self.routers.setdefault(deployment, FakeRouterHandle())

    async def want(self, models: Mapping[str, Any]) -> None:
        config = from_tree({"models": models})
        await self.further.want({n: to_tree(each) for n, each in further_models(config).items()})

    async def until(self, reached: Callable[[], bool]) -> None:
        for _ in range(TURNS_MAX):
            if reached():
                return
            await asyncio.sleep(0)
        raise AssertionError("it never came to that")


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def played(stage: Stage, scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        try:
            await scene()
        finally:
            await stage.further.close()
        assert not any(session.is_open for session in stage.opened)

    asyncio.run(whole())


def test_what_is_wanted_is_served_and_what_stays_is_left_alone(stage: Stage) -> None:
    async def scene() -> None:
        await stage.want({"b": {}, "org/c": {}})
        assert set(stage.front.served) == {"b", "org/c"}
        assert set(stage.routers) == {"router-b", "router-org-c"}
        before = stage.front.served["b"]
        await stage.want({"b": {}, "d": {}})
        assert set(stage.front.served) == {"b", "d"}
        assert stage.front.served["b"] is before

    played(stage, scene)


def test_one_that_does_not_come_up_keeps_nobody_waiting_and_is_tried_again(stage: Stage) -> None:
    async def scene() -> None:
        stage.failing.add("b")
        await stage.want({"b": {}, "c": {}})
        assert set(stage.front.served) == {"c"}
        stage.failing.clear()
        await stage.until(lambda: "b" in stage.front.served)

    played(stage, scene)


def test_a_name_that_is_taken_is_left_out(stage: Stage) -> None:
    async def scene() -> None:
        await stage.want({"taken": {}, "c": {}})
        assert set(stage.front.served) == {"c"}
        assert [session.is_open for session in stage.opened] == [False, True]

    played(stage, scene)


def test_one_that_left_is_closed_when_its_last_request_has_ended(stage: Stage) -> None:
    async def scene() -> None:
        await stage.want({"b": {}})
        session = stage.front.served["b"]
        session.in_flight = 1
        await stage.want({})
        assert stage.front.served == {}
        for _ in range(100):
            await asyncio.sleep(0)
        assert session.is_open
        session.in_flight = 0
        await stage.until(lambda: not session.is_open)

    played(stage, scene)


def test_other_settings_are_another_session(stage: Stage) -> None:
    async def scene() -> None:
        await stage.want({"b": {}})
        await stage.want({"b": {"drain_timeout_s": 5.0}})
        assert len(stage.opened) == 2
        assert stage.front.log == ["+b", "-b", "+b"]

    played(stage, scene)


def test_another_version_s_blocks_get_a_session_that_knows_them_without_a_gap(
    stage: Stage,
) -> None:
    """The router was asked while the former workers were still there."""

    async def scene() -> None:
        await stage.want({"b": {}})
        stage.routers["router-b"].said = "bb"
        await stage.until(lambda: len(stage.opened) == 2 and len(stage.front.log) == 3)
        assert stage.front.served["b"].identity == "bb"
        assert stage.front.log == ["+b", "-b", "+b"]

    played(stage, scene)


def test_wants_that_overtake_each_other_leave_nobody_waiting(stage: Stage) -> None:
    async def scene() -> None:
        held = asyncio.Event()
        opened = opening.open_session

        async def slow(config: ClusterConfig, router: Any) -> Any:
            await held.wait()
            return await opened(config, router)

        opening.open_session = slow
        first = asyncio.create_task(stage.want({"b": {}}))
        await asyncio.sleep(0)
        await stage.want({})
        await first
        held.set()
        assert stage.front.served == {}

    played(stage, scene)


def test_the_first_model_s_session_learns_what_another_version_s_blocks_are_called(
    stage: Stage,
) -> None:
    """Its gateway was there first, and the router had been told by a former worker."""

    async def scene() -> None:
        router, session = FakeRouterHandle(), FakeSession("first", "aa")
        following = asyncio.create_task(follow_blocks(cast(Any, session), cast(Any, router)))
        for identity in ("bb", "cc"):
            router.said = identity
            await stage.until(lambda now=identity: session.identity == now)  # type: ignore[misc]
        following.cancel()

    played(stage, scene)
