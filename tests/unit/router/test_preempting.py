"""Which prefills stop for whom, at a chunk boundary."""

from dataclasses import replace

import pytest

from pdserve.clock import MS, S
from pdserve.ids import RequestId
from pdserve.lifecycle import Event
from pdserve.router import state
from pdserve.router.core import RouterCore
from pdserve.router_config import RouterConfig
from tests.unit.router.build import (
    FAR_MS,
    Reporter,
    core_with,
    hello,
    keys,
    request,
    settings,
    told,
)


def _long_running(
    *, chunk_tokens: int = 128, config: RouterConfig | None = None
) -> tuple[RouterCore, Reporter]:
    core, (p0, _) = core_with(
        hello("p0", chunk_tokens=chunk_tokens), hello("d0"), config=config or settings()
    )
    core.on_submit(request("long", 1500), 0)
    return core, p0


def _is_preempted_by(core: RouterCore, tokens: int) -> bool:
    return "p0 <- preempt long" in told(core.on_submit(request("other", tokens), 0))


def test_a_much_shorter_one_preempts() -> None:
    core, _ = _long_running()
    assert _is_preempted_by(core, 200)


def test_one_of_the_same_level_does_not_preempt() -> None:
    core, _ = _long_running()
    assert not _is_preempted_by(core, 1400)


def test_preemption_can_be_switched_off() -> None:
    core, _ = _long_running(config=settings(preemption=False))
    assert not _is_preempted_by(core, 32)


def _is_preempted_under(config: RouterConfig, tokens: int) -> bool:
    core, _ = _long_running(chunk_tokens=16, config=config)
    return _is_preempted_by(core, tokens)


def test_an_operator_says_how_much_shorter_the_other_must_be() -> None:
    eightfold = replace(settings(), preempt_ratio=8.0)
    assert not _is_preempted_under(eightfold, 200)
    assert _is_preempted_under(eightfold, 160)


def test_one_that_is_hardly_shorter_does_not_preempt() -> None:
    assert _is_preempted_under(settings(), 370)
    assert not _is_preempted_under(settings(), 380)  # a quarter of what is left
    assert _is_preempted_under(replace(settings(), preempt_ratio=1.0), 380)


def test_for_the_sake_of_the_tail_only_much_shorter_ones_preempt() -> None:
    tail = replace(settings(), goal="tail", gamma_per_s=None)
    assert not _is_preempted_under(tail, 64)
    assert _is_preempted_under(tail, 40)
    assert _is_preempted_under(replace(tail, preempt_ratio=8.0), 160)
    assert _is_preempted_under(replace(tail, goal="balanced"), 200)
    assert _is_preempted_under(replace(tail, gamma_per_s=0.12), 200)  # then there is no goal


def test_nobody_is_called_back_while_the_store_loses_what_they_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A loss is earned back at one token in a hundred."""
    monkeypatch.setattr(state, "RECOMPUTE_CREDIT_MAX", 100)
    core, p0 = _long_running()
    long = request("long", 1500)
    p0.chunk(long, 256, elapsed_ms=0)
    assert _is_preempted_by(core, 200)
    p0.event(long, Event.PREEMPTED, computed_tokens=256)
    assert told(p0.event(request("other", 200), Event.PREFILL_DONE))[0].startswith(
        "p0 <- dispatch long"
    )
    p0.chunk(long, 128, elapsed_ms=0)  # it began anew
    assert core.snapshot(0).counters["tokens_lost"] == 128
    assert not _is_preempted_by(core, 150)
    core.on_cancel(RequestId("other"), 0)
    core.state.recompute_credit += 30
    assert _is_preempted_by(core, 150)


def test_the_last_chunk_is_not_preempted() -> None:
    core, p0 = _long_running()
    p0.chunk(request("long", 1500), 1372, elapsed_ms=0)
    assert not _is_preempted_by(core, 8)


def test_a_long_prompt_that_waits_beside_a_short_one_makes_way_for_shorter_ones() -> None:
    core, _ = core_with(hello("p0"), hello("d0"))
    core.on_submit(request("middle", 100), 0)
    core.on_submit(request("long", 1500), 0)
    assert told(core.on_submit(request("short", 8), 0)) == [
        "p0 <- dispatch short, decode d0, level 0, queued 0 ms, ahead of long"
    ]
    assert core.on_submit(request("next", 120), 0) == [], "it is its turn in a chunk's time"
    assert told(core.on_submit(request("more than a chunk", 200), 0)) == []


def test_being_handed_back_unbegun_is_no_preemption() -> None:
    core, (p0, _) = core_with(hello("p0"), hello("d0"))
    core.on_submit(request("r", 64), 0)
    p0.report(draining=True)
    p0.event(request("r", 64), Event.PREEMPTED)
    counters = core.snapshot(0).counters
    assert (counters["handed_back"], "preemptions" in counters) == (1, False)


def test_an_unpreempted_prompt_rises_through_the_levels_as_it_shrinks() -> None:
    core, p0 = _long_running(chunk_tokens=512)
    asked = request("long", 1500)
    p0.chunk(asked, 512, elapsed_ms=512)
    assert core.state.entries[asked.request].level == 6
    p0.chunk(asked, 1024, elapsed_ms=512)
    assert core.state.entries[asked.request].level == 5


def test_one_that_rose_is_not_demoted_for_what_it_took_before() -> None:
    """D4: service is counted per level."""
    core, p0 = _long_running(chunk_tokens=512)
    asked = request("long", 1500)
    for computed in (512, 1024, 1400):
        p0.chunk(asked, computed, elapsed_ms=computed % 512 or 512)
    assert core.state.entries[asked.request].level == 2
    assert "demotions" not in core.snapshot(0).counters


def test_a_demotion_goes_straight_to_the_level_that_covers_what_is_left() -> None:
    """D7: of 1,500 tokens 1,488 were believed to be cached, and none was: from level 0 to level 6,
    where the 1,372 ms that are left belong."""
    core, (p0, _) = core_with(hello("p0"), hello("d0"))
    p0.report(blocks_added=keys("a", 93))
    asked = request("long", 1500, document="a")
    core.on_submit(asked, 0)
    entry = core.state.entries[asked.request]
    assert entry.level == 0
    p0.chunk(asked, 128, elapsed_ms=128)
    assert entry.level == 6
    assert core.snapshot(0).counters["demotions"] == 1


def test_one_that_took_more_than_its_quantum_falls_a_level() -> None:
    """Two steps that got it nowhere took 1,700 ms, where 1.5 s have a quantum of 1,600."""
    core, p0 = _long_running()
    asked = request("long", 1500)
    entry = core.state.entries[asked.request]
    p0.chunk(asked, 0, elapsed_ms=850)
    assert entry.level == 6
    p0.chunk(asked, 0, elapsed_ms=850)
    assert entry.level == 7
    p0.chunk(asked, 1400, elapsed_ms=1)
    assert entry.level == 7, "it rose above a level it was demoted to"


CHUNK_TOKENS, SHORT_TOKENS = 128, 64


def test_who_has_begun_is_computed_however_many_shorter_ones_come() -> None:
    """Two that fill a chunk come with every chunk; from its claim's instant on it keeps a part."""
    believed = RouterConfig(
        prefill_tokens_per_s=1000,
        gamma_per_s=0.001,
        worker_silence_ms=FAR_MS,
        rescue_after_ms=1000,
        rescue_ratio=1.0,
    )
    core, (p0, _) = core_with(hello("p0", chunk_tokens=CHUNK_TOKENS), hello("d0"), config=believed)
    long = request("long", 1500)
    core.on_submit(long, 0)
    left = {long.request: 1500}
    known = {long.request: long}
    now_ns = 0
    for round_ in range(200):
        budget = CHUNK_TOKENS
        worker = core.state.fleet.get(p0.hello.worker)
        assert worker is not None
        now_ns += CHUNK_TOKENS * MS
        for name in list(worker.prompts):
            computed = min(budget, left[name])
            budget -= computed
            left[name] -= computed
            if left[name] == 0:
                core.on_cancel(name, now_ns)  # it is prefilled: for this test, gone
            elif computed:
                done = len(known[name].tokens) - left[name]
                p0.chunk(known[name], done, elapsed_ms=computed, now_ns=now_ns)
        if left[long.request] == 0:
            break
        for half in range(2):
            short = request(f"s{round_}-{half}", SHORT_TOKENS)
            left[short.request], known[short.request] = SHORT_TOKENS, short
            core.on_submit(short, now_ns)
    assert left[long.request] == 0, f"{left[long.request]} tokens are left after {now_ns / S:.0f} s"
    assert now_ns < 10 * S
