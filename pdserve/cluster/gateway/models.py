"""Which model of a gateway answers: a session and a router for each, found by what clients say.

    body.model ──of──► session ──► the model's own router, and pools of its own

The first model is the one that is meant where none is named; it is always there. Further ones come
and go while the gateway runs (``opening``). With one model alone nothing here is seen.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from pdserve.cluster.gateway.calls import Session
from pdserve.cluster.gateway.parameters import check_name
from pdserve.config import GatewayConfig
from pdserve.errors import ConfigError, PdserveError, StoreUnavailable, UnknownModel

ANSWER_S = 1.5
"""How long one of several routers may take for its figures: less than those who look wait."""

Ask = Callable[[], Awaitable[Mapping[str, Any]]]
"""A question to a model's router."""

Assign = Callable[[str, str], Awaitable[str]]
"""Worker and role; why it cannot be, or nothing."""


@dataclass(frozen=True, slots=True)
class Control:
    """What one model's router answers."""

    snapshot: Ask
    recording: Ask
    operations: Mapping[str, Ask] = field(default_factory=dict)  # by their path
    assign: Assign | None = None


class Models:
    """Of one gateway; changed and read on its event loop."""

    def __init__(self, first: Session, config: GatewayConfig) -> None:
        self._sessions = {first.model_name: first}
        self._configs = {first.model_name: config}
        self._first = first

    @property
    def first(self) -> Session:
        return self._first

    def __iter__(self) -> Iterator[Session]:
        """The sessions, the first model's first."""
        return iter(tuple(self._sessions.values()))

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def names(self) -> tuple[str, ...]:
        """All that may be said in ``model``: each model's own, then those of its adapters."""
        return tuple(name for each in self for name in (each.model_name, *each.adapters))

    def of(self, name: str | None) -> Session:
        """The session that answers to ``name``, a model's or an adapter's; nothing is the first's.

        Raises:
            UnknownModel: nobody does; it says who is here.
            InvalidField: it is too long for a name.
        """
        if not name:
            return self._first
        session = self._sessions.get(name)
        if session is not None:
            return session
        for each in self:
            if name in each.adapters:
                return each
        check_name(name)
        raise UnknownModel(name, *self.names)

    def asked(self, body: Mapping[str, Any]) -> tuple[Session, GatewayConfig]:
        """Who answers a body, and by which settings. What is no text in its ``model`` is refused
        by whoever reads the body.

        Raises:
            UnknownModel, InvalidField: as of ``of``.
        """
        name = body.get("model")
        session = self.of(name if isinstance(name, str) else None)
        return session, self._configs[session.model_name]

    def config(self, session: Session) -> GatewayConfig:
        """The gateway's settings, with how this model's texts are read."""
        return self._configs[session.model_name]

    def cancel(self, call: str, *, tenant: str | None = None) -> bool:
        """As a session's, whichever runs it."""
        cancelled = [each.cancel(call, tenant=tenant) for each in self]
        return any(cancelled)

    def add(self, session: Session, config: GatewayConfig) -> None:
        """
        Args:
            config: the gateway's, with how this model's texts are read.

        Raises:
            ConfigError: a model or an adapter of this name is here already.
        """
        taken = {session.model_name, *session.adapters}.intersection(self.names)
        if taken:
            raise ConfigError(
                f"two models are called {', '.join(sorted(taken))}; give model.served_name, or "
                "the entry in models, another name"
            )
        self._sessions[session.model_name] = session
        self._configs[session.model_name] = config

    def remove(self, name: str) -> None:
        """Nobody finds it any more; calls under way are their session's."""
        assert name != self._first.model_name, "the first model stays"
        self._sessions.pop(name, None)
        self._configs.pop(name, None)


class Controls:
    """The routers of a gateway's models, in the order of ``Models``."""

    def __init__(self, first: str, control: Control) -> None:
        self._by_name = {first: control}
        self._first = first

    def add(self, name: str, control: Control) -> None:
        self._by_name[name] = control

    def remove(self, name: str) -> None:
        assert name != self._first, "the first model stays"
        self._by_name.pop(name, None)

    def of(self, name: str | None) -> Control:
        """Of the model of this name; nothing is the first.

        Raises:
            UnknownModel: there is none.
        """
        control = self._by_name.get(name or self._first)
        if control is None:
            check_name(name or "")
            raise UnknownModel(name or "", *self._by_name)
        return control

    async def snapshot(self) -> Mapping[str, Any]:
        """Of all routers together (``merged``); of the one, where there is one model.

        Raises:
            PdserveError: none of them answers.
        """
        if len(self._by_name) == 1:
            return await self._by_name[self._first].snapshot()
        controls = dict(self._by_name)  # more may come while they are asked
        said = await asyncio.gather(
            *(_in_time(each.snapshot) for each in controls.values()), return_exceptions=True
        )
        answers = {}
        for name, answer in zip(controls, said, strict=True):
            if not isinstance(answer, BaseException):
                answers[name] = answer
            elif not isinstance(answer, PdserveError | TimeoutError):
                raise answer
        if not answers:
            raise StoreUnavailable("the router of no model answers at this moment; try again")
        return merged(answers, silent=[name for name in controls if name not in answers])

    async def assign(self, worker: str, role: str) -> str:
        """Asks the router that has the worker; why it cannot be, or nothing."""
        name: str | None = None
        if len(self._by_name) > 1:
            workers = (await self.snapshot())["workers"]
            name = next((each["model"] for each in workers if each["worker"] == worker), None)
        assign = self.of(name).assign
        assert assign is not None, "routers that can be asked have one"
        return await assign(worker, role)


async def _in_time(ask: Ask) -> Mapping[str, Any]:
    async with asyncio.timeout(ANSWER_S):
        return await ask()


def merged(
    snapshots: Mapping[str, Mapping[str, Any]], *, silent: Sequence[str] = ()
) -> dict[str, Any]:
    """The snapshots of several models' routers as one, for whoever looks at the whole cluster.

    Workers say whose they are; counts are sums, and the oldest wait is the longest. Under
    ``models`` each router's own figures stand by name, without its workers; ``silent`` routers have
    none there. What has no meaning over several (mode, leadership) is the first one's.
    """
    first = next(iter(snapshots.values()))
    whole = dict(first)
    whole["workers"] = [
        {**worker, "model": name}
        for name, snapshot in snapshots.items()
        for worker in snapshot["workers"]
    ]
    for key in ("queued_work_ms", "parked"):
        whole[key] = sum(snapshot[key] for snapshot in snapshots.values())
    for key in ("phases", "counters"):
        total: Counter[str] = Counter()
        for snapshot in snapshots.values():
            total.update(snapshot[key])
        whole[key] = dict(total)
    levels = (snapshot["queue_lengths"] for snapshot in snapshots.values())
    whole["queue_lengths"] = [sum(level) for level in zip_longest(*levels, fillvalue=0)]
    oldest = max(snapshots.values(), key=lambda snapshot: snapshot["oldest_wait_ms"])
    whole |= {key: oldest[key] for key in ("oldest_wait_ms", "oldest_request")}
    whole["models"] = {
        **{
            name: {key: value for key, value in snapshot.items() if key != "workers"}
            for name, snapshot in snapshots.items()
        },
        **{name: {} for name in silent},
    }
    return whole


def by_model(snapshot: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Each model's own part of what ``merged`` made, workers included; {} of one model's."""
    return {
        name: {
            **figures,
            "workers": [each for each in snapshot["workers"] if each["model"] == name],
        }
        for name, figures in snapshot.get("models", {}).items()
        if figures
    }
