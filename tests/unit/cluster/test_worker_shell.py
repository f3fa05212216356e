"""What a worker's shell makes of its engine's words: which reports leave, and what they hold."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest

from pdserve.cluster import store_watch
from pdserve.cluster.store_watch import StoreWatch
from pdserve.cluster.worker_shell import BATCH_TOKENS_MAX, WorkerShell, in_batches
from pdserve.config import ClusterConfig
from pdserve.engine.outputs import Load, OfPrompt, Output, ToDecode, ToGateway, ToRouter
from pdserve.errors import CapacityError, QueueFull, RankLost, StoreUnavailable
from pdserve.ids import HostId, RequestId, WorkerId
from pdserve.kvstore.client import StoreClient
from pdserve.lifecycle import Event
from pdserve.messages import (
    Attained,
    Cancel,
    ChunkDone,
    Dispatch,
    FinishReason,
    Goodbye,
    Progress,
    Report,
    Resume,
    Role,
    Route,
    Timing,
    Token,
    TokenDelta,
    WorkerFailed,
)
from pdserve.prompt_tasks import PromptDelta
from pdserve.router_config import RouterConfig
from tests.unit.router.build import address, hello, request
from tests.unit.router.build import handoff as handoff_of

ATTAINED = (Attained(RequestId("r"), 0, 7),)
CALM = Load(running=1, waiting=0, free_blocks=5)


class FakeLink:
    connected = True

    def __init__(self) -> None:
        self.posted: list[Any] = []

    def post(self, message: object) -> None:
        self.posted.append(message)

    def post_now(self, message: object) -> None:
        self.posted += ["now", message]


def reports_of(scenario: Callable[[WorkerShell], None]) -> list[Report]:
    link = FakeLink()

    async def play() -> None:
        shell = WorkerShell(Role.DECODE, ClusterConfig(), host=HostId("h"))
        shell._link = link  # type: ignore[assignment]
        shell._send([], CALM)  # the router knows this much
        link.posted.clear()
        scenario(shell)

    asyncio.run(play())
    return link.posted


def test_a_load_that_says_nothing_new_is_not_reported() -> None:
    assert reports_of(lambda shell: shell._send([], CALM)) == []


def test_how_far_streams_have_come_is_reported_once() -> None:
    def scenario(shell: WorkerShell) -> None:
        shell._send([], Load(running=1, waiting=0, free_blocks=5, attained=ATTAINED))
        shell._report()

    assert [report.attained for report in reports_of(scenario)] == [ATTAINED, ()]


def test_what_one_step_says_of_a_request_is_one_report_in_its_order() -> None:
    request = RequestId("r")
    done, adopted = (Progress(request, 0, e) for e in (Event.PREFILL_DONE, Event.ADOPTED))
    chunk = ChunkDone(request, 0, 8, 100)

    def scenario(shell: WorkerShell) -> None:
        shell._send([ToRouter(chunk), ToRouter(done), ToRouter(adopted)], CALM)

    (report,) = reports_of(scenario)
    assert (report.chunks, report.progress) == ((chunk,), (done, adopted))


def said_when_heard(message: object) -> list[object]:
    """What the router has been told when the engine gets the message, and that."""
    order: list[object] = []

    def scenario(shell: WorkerShell) -> None:
        def submit(submitted: object) -> None:
            order.extend([*shell._link.posted, submitted])  # type: ignore[union-attr]

        shell._engine = SimpleNamespace(submit=submit)  # type: ignore[assignment]
        shell.hear(message)

    reports_of(scenario)
    return order


def test_a_request_with_deaths_is_vouched_for_before_the_engine_has_it() -> None:
    """Which may die of it before anything else is said."""
    innocent = request("r", 20)
    suspect = replace(innocent, attempt=1, deaths=1)
    route = Route(WorkerId("p"), WorkerId("d"), address("d"), address("store"))
    first = Dispatch(innocent, route, Timing())
    assert said_when_heard(first) == [first]
    for message in (Dispatch(suspect, route, Timing()), Resume(handoff_of(suspect, hello("p")))):
        now, report, submitted = said_when_heard(message)
        assert (now, submitted) == ("now", message)
        assert isinstance(report, Report)
        assert report.attained == (Attained(RequestId("r"), 1, 0),)


def refused(*outputs: Output) -> tuple[list[object], list[object]]:
    """What engine and router hear when the peers have left too much unread."""
    submitted: list[object] = []

    def full(*_: object) -> None:
        raise CapacityError("16384 messages wait already", retry_after_ms=50)

    def scenario(shell: WorkerShell) -> None:
        shell._engine = SimpleNamespace(submit=submitted.append)  # type: ignore[assignment]
        shell._postbox = SimpleNamespace(post=full)  # type: ignore[assignment]
        shell._send(outputs, CALM)

    return submitted, list(reports_of(scenario))


def test_tokens_that_find_no_room_end_their_streams_and_the_router_is_told() -> None:
    """Or the gateway would wait for them until the deadline."""
    delta = TokenDelta(RequestId("r"), 2, 5, (Token(1),))
    submitted, (failed,) = refused(ToGateway(address("g"), delta))
    assert submitted == [Cancel(RequestId("r"), 2)]
    assert isinstance(failed, WorkerFailed)
    assert (failed.request, failed.attempt, failed.error.kind) == ("r", 2, "worker_lost")


def test_what_is_left_over_of_an_attempt_ends_no_later_one() -> None:
    """Found by ``tests.simulation``: the gateway had asked again by the time its letters were given
    up, and the attempt that then ran here was ended with the one before it."""
    delta = TokenDelta(RequestId("r"), 0, 5, (Token(1),))
    known = PromptDelta(RequestId("r"), 0)
    outputs: list[Output] = [ToGateway(address("g"), delta), OfPrompt(address("g"), known)]
    for output in outputs:
        submitted, _ = refused(output)
        (cancel,) = submitted
        assert isinstance(cancel, Cancel)
        assert cancel.covers(0)
        assert not cancel.covers(1)


def test_an_end_that_finds_no_room_is_told_before_the_report_of_it() -> None:
    """The router forgets whom that report names."""
    delta = TokenDelta(RequestId("r"), 0, 0, (Token(1),), FinishReason.LENGTH)
    ended = Progress(RequestId("r"), 0, Event.ENDED)
    _, said = refused(ToGateway(address("g"), delta), ToRouter(ended))
    assert [type(each) for each in said] == [WorkerFailed, Report]


def test_a_hand_off_that_finds_no_room_goes_back_to_the_router() -> None:
    handoff = handoff_of(request("r", 20), hello("p"))
    submitted, (failed,) = refused(ToDecode(address("d"), handoff))
    assert submitted == []
    assert isinstance(failed, WorkerFailed)
    assert (failed.request, failed.attempt) == ("r", 0)


def test_a_lost_rank_is_ill_health_before_any_step_meets_it() -> None:
    def lost() -> None:
        raise RankLost("rank 1 ended")

    async def ask() -> None:
        shell = WorkerShell(Role.DECODE, ClusterConfig(), host=HostId("h"))
        shell._engine = SimpleNamespace(alive=True, stuck_ns=lambda: 0)  # type: ignore[assignment]
        shell.check_health()
        shell._parts = SimpleNamespace(followers=SimpleNamespace(check=lost))  # type: ignore[assignment]
        shell.check_health()

    with pytest.raises(RuntimeError, match="rank 1 ended"):
        asyncio.run(ask())


def test_a_router_that_takes_nothing_hears_everything_anew() -> None:
    """A report that is left out would take blocks and ends of requests with it, for good."""
    done: list[str] = []

    def full(message: object) -> NoReturn:
        raise QueueFull(f"no room for a {type(message).__name__}", retry_after_ms=1000)

    def scenario(shell: WorkerShell) -> None:
        begin_anew = partial(done.append, "begun anew")
        shell._link = SimpleNamespace(post=full, begin_anew=begin_anew)  # type: ignore[assignment]
        shell._report()

    reports_of(scenario)
    assert done == ["begun anew"]


def test_who_lost_its_store_says_goodbye_so_that_no_request_is_blamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_watch, "ASK_S", 0.0)
    said: list[object] = []

    async def close() -> None:
        said.append("closed")

    def ask(after: int) -> NoReturn:
        raise StoreUnavailable("nobody answers")

    async def leave() -> None:
        shell = WorkerShell(Role.DECODE, ClusterConfig(), host=HostId("h"))
        shell._link = SimpleNamespace(post=said.append, close=close)  # type: ignore[assignment]
        shell._engine = SimpleNamespace(submit=said.append, alive=True, stuck_ns=lambda: 0)  # type: ignore[assignment]
        shell._store = StoreWatch(cast(StoreClient, SimpleNamespace(changes=ask)))
        await shell._follow_store(shell._store)
        with pytest.raises(RuntimeError, match="lost its store node: nobody answers"):
            shell.check_health()

    asyncio.run(leave())
    goodbye, closed, *_ = said
    assert isinstance(goodbye, Goodbye)
    assert closed == "closed"


@pytest.mark.parametrize(
    ("role", "mode", "tells"),
    [
        (Role.PREFILL, "disaggregated", True),
        (Role.DECODE, "disaggregated", False),
        (Role.DECODE, "aggregated", True),
        (Role.DECODE, "auto", True),
    ],
)
def test_who_may_prefill_tells_of_its_hosts_store(role: Role, mode: Any, *, tells: bool) -> None:
    async def ask() -> bool:
        config = ClusterConfig(router=RouterConfig(mode=mode))
        return WorkerShell(role, config, host=HostId("h"))._tells_of_store()

    assert asyncio.run(ask()) is tells


def test_long_answers_go_out_in_several_messages_in_their_order() -> None:
    def delta(token_count: int) -> TokenDelta:
        return TokenDelta(RequestId("r"), 0, 0, (Token(1),) * token_count)

    def lengths(*token_counts: int) -> list[list[int]]:
        batches = in_batches([delta(count) for count in token_counts])
        return [[len(each.tokens) for each in batch] for batch in batches]

    most = BATCH_TOKENS_MAX
    assert lengths() == []
    assert lengths(1, 2, 3) == [[1, 2, 3]]
    assert lengths(1, most - 1, 1) == [[1, most - 1], [1]]
    assert lengths(most, 0, most + 1, 2) == [[most, 0], [most + 1], [2]]
