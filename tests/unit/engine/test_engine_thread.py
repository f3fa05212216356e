"""EngineThread: steps while busy, sleeps otherwise, and says so when its loop breaks."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from pdserve.engine import thread as thread_module
from pdserve.engine.outputs import Load, Output, ToRouter
from pdserve.engine.thread import EngineThread
from pdserve.errors import QueueFull
from pdserve.ids import RequestId
from pdserve.lifecycle import Event
from pdserve.messages import Progress

SAID = ToRouter(Progress(RequestId("r"), 0, Event.ENDED))


class FakeLoop:
    """Does one step of work per message; says one output per message."""

    def __init__(self) -> None:
        self.work: list[object] = []
        self.handled: list[object] = []
        self.step_count = 0
        self.closed = threading.Event()
        self.drained = threading.Event()
        self.in_step = threading.Event()
        self.gate: threading.Event | None = None
        self.wake: Callable[[], None] = lambda: None

    def handle(self, message: Any) -> None:
        self.handled.append(message)
        self.work.append(message)

    def step(self) -> list[Output]:
        self.step_count += 1
        self.in_step.set()
        if self.gate is not None:
            assert self.gate.wait(10)
        if not self.work:
            return []
        if self.work.pop(0) == "break":
            raise ZeroDivisionError
        return [SAID]

    def busy(self) -> bool:
        return bool(self.work)

    def load(self) -> Load:
        return Load(running=len(self.work), waiting=0, free_blocks=1)

    def drain(self) -> None:
        self.drained.set()

    def wake_by(self, wake: Callable[[], None]) -> None:
        self.wake = wake

    def close(self) -> None:
        self.closed.set()


class Heard:
    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.news = threading.Semaphore(0)

    def __call__(self, outputs: list[Output], load: Load) -> None:
        self.outputs += outputs
        for _ in outputs:
            self.news.release()

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self.news.acquire(timeout=10)


def test_messages_are_handled_in_order_and_their_outputs_emitted() -> None:
    loop, heard = FakeLoop(), Heard()
    engine = EngineThread(loop, heard, name="e")
    for message in range(5):
        engine.submit(message)
    heard.wait(5)
    engine.stop(timeout_s=10)
    assert loop.handled == [0, 1, 2, 3, 4]
    assert loop.closed.is_set()
    assert not engine.alive
    assert engine.error is None


def test_a_finished_move_wakes_it() -> None:
    loop, heard = FakeLoop(), Heard()
    engine = EngineThread(loop, heard, name="e")
    loop.work.append("moved")  # as the mover would leave it; nobody submits anything
    loop.wake()
    heard.wait(1)
    engine.stop(timeout_s=10)


def test_an_idle_engine_takes_no_steps() -> None:
    loop, heard = FakeLoop(), Heard()
    engine = EngineThread(loop, heard, name="e")
    engine.submit("a")
    heard.wait(1)
    engine.submit("b")
    heard.wait(1)
    engine.stop(timeout_s=10)
    assert loop.step_count == 2


def test_a_broken_loop_is_dead_and_its_error_is_kept() -> None:
    loop = FakeLoop()
    engine = EngineThread(loop, Heard(), name="e")
    engine.submit("break")
    assert loop.closed.wait(10)
    assert isinstance(engine.error, ZeroDivisionError)
    assert not engine.alive


def test_what_comes_first_runs_on_its_thread_before_any_message() -> None:
    loop, heard, names = FakeLoop(), Heard(), []
    engine = EngineThread(
        loop, heard, name="e", first=lambda: names.append(threading.current_thread().name)
    )
    engine.submit(0)
    heard.wait(1)
    engine.stop(timeout_s=10)
    assert names == ["e"]


def test_drain_reaches_the_loop() -> None:
    loop = FakeLoop()
    engine = EngineThread(loop, Heard(), name="e")
    engine.drain()
    assert loop.drained.wait(10)
    engine.stop(timeout_s=10)


def test_a_full_inbox_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_module, "INBOX_MAX", 2)
    loop = FakeLoop()
    loop.gate = threading.Event()
    engine = EngineThread(loop, Heard(), name="e")
    engine.submit("taken")
    assert loop.in_step.wait(10)
    engine.submit("waits")
    engine.submit("waits too")
    with pytest.raises(QueueFull, match="2 messages wait for e already"):
        engine.submit("one more")
    loop.gate.set()
    engine.stop(timeout_s=10)


def test_a_hanging_step_shows() -> None:
    now_ns = [100]
    loop = FakeLoop()
    loop.gate = threading.Event()
    engine = EngineThread(loop, Heard(), name="e", clock=lambda: now_ns[0])
    assert engine.stuck_ns() == 0
    engine.submit("a")
    assert loop.in_step.wait(10)
    now_ns[0] = 350
    assert engine.stuck_ns() == 250
    loop.gate.set()
    engine.stop(timeout_s=10)
    assert engine.stuck_ns() == 0
    assert engine.last_step_ns() == 350
