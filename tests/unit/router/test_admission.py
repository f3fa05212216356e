"""Who is turned away for an objective that cannot be kept. One worker, a token is a millisecond."""

from dataclasses import replace

import pytest

from pdserve.clock import MS
from pdserve.messages import Refused, Request, ServiceClass
from pdserve.router.admission import RESUME_RATIO, RETRY_MS_MIN, predicted_ttft_ns
from pdserve.router.core import Command, RouterCore
from pdserve.router_config import RouterConfig
from tests.unit.router.build import core_with, hello, keys, request, settings

SLO_MS = 1000.0
WITH_SLO = replace(settings(), ttft_slo_ms=SLO_MS)


def _core(config: RouterConfig = WITH_SLO, *, workers: int = 1) -> RouterCore:
    prefills = [hello(f"p{index}") for index in range(workers)]
    return core_with(*prefills, hello("d0"), config=config)[0]


def _asked(name: str, tokens: int, service_class: ServiceClass = ServiceClass.STANDARD) -> Request:
    return replace(request(name, tokens), service_class=service_class)


def _refusals(commands: list[Command]) -> list[tuple[str, int | None]]:
    errors = [c.message.error for c in commands if isinstance(c.message, Refused)]
    return [(error.message, error.retry_after_ms) for error in errors]


def test_it_is_turned_away_when_its_first_token_would_be_too_late() -> None:
    """600 ms run, 300 wait: with 150 of its own that is 50 too many; at 800 there is room again."""
    core = _core()
    assert _refusals(core.on_submit(_asked("runs", 600), 0)) == []
    assert _refusals(core.on_submit(_asked("waits", 300), 0)) == []
    assert _refusals(core.on_submit(_asked("late", 350), 0)) == [
        ("the first token is predicted in 1250 ms, ttft_slo_ms is 1000; try again in 450 ms", 450)
    ]
    assert core.snapshot(0).counters["shed"] == core.snapshot(0).counters["refused"] == 1


def test_what_goes_behind_it_does_not_count() -> None:
    core = _core()
    core.on_submit(_asked("runs", 600), 0)
    core.on_submit(_asked("waits", 390), 0)
    assert _refusals(core.on_submit(_asked("short", 50), 0)) == []


def test_what_is_cached_need_not_be_computed() -> None:
    core, (p0, _) = core_with(hello("p0"), hello("d0"), config=WITH_SLO)
    p0.report(store_added=keys("a", 100))
    assert _refusals(core.on_submit(request("cached", 1610, document="a"), 0)) == []
    assert len(_refusals(core.on_submit(request("cold", 1610), 0))) == 1


def test_more_workers_share_what_waits() -> None:
    for workers, refused in ((1, 1), (2, 0)):
        core = _core(workers=workers)
        for name in ("a", "b"):
            core.on_submit(_asked(name, 450), 0)
        assert len(_refusals(core.on_submit(_asked("c", 450), 0))) == refused


def test_refusing_goes_on_until_there_is_room_to_spare() -> None:
    """From 1,000 ms on, down to 800: in between it depends on where one comes from."""
    core, _ = core_with(hello("p0", chunk_tokens=1), hello("d0"), config=WITH_SLO)
    runs = _asked("runs", 700)
    core.on_submit(runs, 0)

    def is_refused(name: str, tokens: int) -> bool:
        asked = _asked(name, tokens)
        refused = bool(_refusals(core.on_submit(asked, 0)))
        core.on_cancel(asked.request, 0)
        return refused

    assert not is_refused("a", 300)
    assert is_refused("b", 301)
    assert is_refused("c", 300)
    assert is_refused("d", 101)
    assert not is_refused("e", 100)
    assert not is_refused("f", 300)
    assert pytest.approx(800) == RESUME_RATIO * SLO_MS


def test_each_class_has_its_own_memory() -> None:
    core = _core()
    core.on_submit(_asked("runs", 700), 0)
    assert _refusals(core.on_submit(_asked("standard", 400), 0))
    interactive = _asked("interactive", 290, ServiceClass.INTERACTIVE)
    assert _refusals(core.on_submit(interactive, 0)) == []


def test_batch_work_waits_as_long_as_it_takes() -> None:
    core = _core()
    core.on_submit(_asked("runs", 900), 0)
    assert _refusals(core.on_submit(_asked("batch", 5000, ServiceClass.BATCH), 0)) == []
    assert core.snapshot(0).phases["queued"] == 1


def test_a_second_attempt_is_never_turned_away() -> None:
    core = _core()
    core.on_submit(_asked("runs", 900), 0)
    again = request("again", 500, prompt_tokens=490, attempt=1)
    assert _refusals(core.on_submit(again, 0)) == []


def test_a_hint_is_never_less_than_a_moment() -> None:
    core = _core(replace(settings(), ttft_slo_ms=100.0))
    ((_, retry_after_ms),) = _refusals(core.on_submit(_asked("a", 101), 0))
    assert retry_after_ms == RETRY_MS_MIN


def test_without_an_objective_or_without_workers_nothing_is_predicted() -> None:
    free = _core(settings())
    free.on_submit(_asked("runs", 900), 0)
    assert _refusals(free.on_submit(_asked("a", 900), 0)) == []
    nobody = _core(workers=0)
    assert _refusals(nobody.on_submit(_asked("a", 9000), 0)) == []


@pytest.mark.parametrize("policy", ["skip_join", "fcfs", "sjf"])
def test_a_prediction_knows_which_order_it_is_for(policy: str) -> None:
    """A short one passes what waits where short ones pass; elsewhere all of it counts."""
    config = replace(WITH_SLO, policy=policy, level_count=8)  # type: ignore[arg-type]
    core = _core(config)
    core.on_submit(_asked("runs", 500), 0)
    core.on_submit(_asked("waits", 400), 0)
    predicted_ms = predicted_ttft_ns(core.state, _asked("short", 10)) // MS
    assert predicted_ms == (510 if policy == "skip_join" else 910)
