"""A step that raises fails its requests alone; nobody waits, nothing stays, and others go on."""

from dataclasses import replace
from typing import Any

import pytest

from pdserve.clock import MS, S, monotonic, steady_unix_ms
from pdserve.engine.faults import FaultyRunner, StepFault, faults_of
from pdserve.engine.loop import FAILED_STEPS_MAX
from pdserve.engine.runner import ends_worker
from pdserve.errors import ConfigError, IllegalTransition, RankLost
from pdserve.messages import WorkerFailed
from tests.unit.engine.rig import Rig, plain, request


def test_the_faults_of_a_worker_are_read_from_one_text() -> None:
    assert faults_of("") == ()
    assert faults_of("exit:7,hang:8:/tmp/x") == (
        StepFault("exit", 7),
        StepFault("hang", 8, "/tmp/x"),
    )
    for text in ("stop:7", "raise:", "raise:x", "raise"):
        with pytest.raises(ConfigError, match="exit, raise or hang"):
            faults_of(text)


def test_a_fault_strikes_the_step_that_computes_its_token() -> None:
    class Run:
        tokens = (1, 2, 3)

    class Inner:
        counted = 0

        def step(self, *_: object) -> str:
            self.counted += 1
            return "logits"

    inner = Inner()
    runner = FaultyRunner(inner, [StepFault("raise", 9)])
    assert runner.step([Run()]) == "logits"  # type: ignore[list-item]
    Run.tokens = (1, 9, 3)
    with pytest.raises(MemoryError, match="token 9"):
        runner.step([Run()])  # type: ignore[list-item]
    assert runner.counted == inner.counted == 1


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (MemoryError("no room"), False),
        (RuntimeError("shapes differ"), False),
        (RankLost("rank 1 is gone"), True),
        (IllegalTransition("a bug"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
    ],
)
def test_what_leaves_a_device_broken_ends_the_worker(error: Exception, ends: bool) -> None:
    assert ends_worker(error) == ends


# ── in a loop ────────────────────────────────────────────────────────────────────────────────────


def _raising(rig: Rig, name: str, times: int) -> None:
    """The next so many steps of that worker raise."""
    runner = rig.runners[name]
    step, left = runner.step, times

    def raising(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise MemoryError("no room")
        return step(*arguments, **named)

    runner.step = raising  # type: ignore[method-assign]


def _failures(rig: Rig) -> dict[str, tuple[str, bool]]:
    return {
        str(each.request): (each.error.kind, each.alone)
        for each in rig.to_router
        if isinstance(each, WorkerFailed)
    }


@pytest.mark.parametrize("step_ahead", [False, True])
def test_streams_of_a_step_that_raised_are_failed_and_the_next_ones_run(step_ahead: bool) -> None:
    rig = Rig(step_ahead=step_ahead)
    rig.prefill()
    loop = rig.decode()
    names = ("a", "b")
    for index, name in enumerate(names):
        rig.send(request(name, range(index, index + 9), max_tokens=12))
    while not (rig.tokens("a") and rig.tokens("b") and len(rig.tokens("b")) > 2):
        for each in (*rig.prefills.values(), loop):
            rig.step(each)
    _raising(rig, "d0", 1)
    rig.run()
    assert _failures(rig) == dict.fromkeys(names, ("step_failed", True))
    assert loop.load().counters["steps_failed"] == 1
    rig.check_idle()
    later = request("c", range(3, 12), max_tokens=5)
    rig.send(later)
    rig.run()
    assert rig.tokens("c") == plain(later)


def test_a_suspect_stands_out_among_the_prompts_of_a_step() -> None:
    rig = Rig()
    rig.prefill(chunk_tokens=64)
    rig.decode()
    suspect = replace(request("s", range(1, 10)), deaths=1)
    for each in (request("a", range(9)), suspect, request("b", range(2, 11))):
        rig.send(each)
    _raising(rig, "p0", 1)
    rig.run()
    assert _failures(rig) == {
        "a": ("step_failed", False),
        "s": ("step_failed", True),
        "b": ("step_failed", False),
    }
    rig.check_idle()


def test_a_worker_whose_steps_all_raise_ends() -> None:
    rig = Rig()
    loop = rig.prefill()
    rig.decode()
    _raising(rig, "p0", 100)
    for index in range(FAILED_STEPS_MAX - 1):
        rig.send(request(f"r{index}", range(9)))
        rig.run()
    rig.send(request("last", range(9)))
    with pytest.raises(MemoryError):
        rig.run()
    assert loop.load().counters["steps_failed"] == FAILED_STEPS_MAX - 1


def test_what_is_too_late_is_dropped_and_not_computed() -> None:
    now_ns = 0
    rig = Rig(clock=lambda: now_ns)
    loop = rig.prefill()
    rig.decode()
    soon_ms = steady_unix_ms() - monotonic() // MS + 1000  # at a second by the loop's clock
    rig.send(replace(request("r", range(9)), deadline_unix_ms=soon_ms))
    now_ns = 2 * S
    rig.run()
    assert loop.load().counters["expired"] == 1
    assert "prompt_tokens_computed" not in loop.load().counters
    rig.check_idle()
