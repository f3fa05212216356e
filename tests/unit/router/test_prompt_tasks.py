"""Requests that end with their prompt need no decode worker: where they go, and what they hold."""

from dataclasses import replace
from typing import Any

import pytest

from pdserve.clock import MS
from pdserve.lifecycle import Event
from pdserve.messages import Dispatch, Request
from pdserve.prompt_tasks import Pooling, Scoring
from pdserve.router.core import Command, RouterCore
from tests.unit.router.build import add, core_with, hello, request, settings


def asked(name: str, tokens: int = 32, *, scored: bool = False) -> Request:
    return replace(request(name, tokens), task=Scoring() if scored else Pooling())


def dispatch(commands: list[Command]) -> Dispatch:
    (command,) = commands
    assert isinstance(command.message, Dispatch)
    return command.message


def test_it_goes_to_a_prefill_worker_where_nobody_decodes() -> None:
    core, (p0,) = core_with(hello("p0"))
    assert core.on_submit(request("plain", 32), 0) == []
    told = dispatch(core.on_submit(asked("r"), 0))
    assert (told.route.prefill, told.route.decode) == ("p0", "p0")
    assert told.timing.decisions[-1].reason.endswith("ends there")
    core.state.check()
    p0.event(asked("r"), Event.ENDED)
    core.state.check()
    assert core.state.counters["finished"] == 1
    assert core.state.fleet.at(0).streams == {}


def test_it_takes_no_room_for_decoding() -> None:
    core, (_, d0) = core_with(hello("p0"), hello("d0"))
    dispatch(core.on_submit(asked("r"), 0))
    decode = core.state.fleet.get(d0.hello.worker)
    assert decode is not None
    assert (decode.streams, decode.reserved_blocks) == ({}, 0)


@pytest.mark.parametrize("mode", ["auto", "aggregated"])
def test_with_workers_that_do_both_it_ends_where_it_is_computed(mode: Any) -> None:
    core = RouterCore(replace(settings(), mode=mode), unix_zero_ms=0)
    add(core, hello("d0"))
    told = dispatch(core.on_submit(asked("r"), 0))
    assert (told.route.prefill, told.route.decode) == ("d0", "d0")
    core.state.check()


def test_preempted_it_comes_back_and_lost_it_is_told() -> None:
    core, (p0,) = core_with(hello("p0"))
    long = asked("r", 640)
    dispatch(core.on_submit(long, 0))
    again = dispatch(p0.event(long, Event.PREEMPTED, computed_tokens=128, now_ns=10 * MS))
    assert again.request == long
    commands = core.on_worker_lost(p0.hello.worker, 20 * MS)
    assert [type(command.message).__name__ for command in commands] == ["Lost"]
    assert core.state.entries == {}


def test_a_chunk_of_scores_says_nothing_about_a_workers_speed() -> None:
    for scored in (False, True):
        core, (p0,) = core_with(hello("p0"))
        long = asked("r", 640, scored=scored)
        dispatch(core.on_submit(long, 0))
        before = core.state.fleet.at(0).correction.factor
        p0.chunk(long, 128, elapsed_ms=10_000)
        assert (core.state.fleet.at(0).correction.factor == before) == scored
