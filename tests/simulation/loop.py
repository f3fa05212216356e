"""An asyncio event loop whose clock jumps, and whose every callback belongs to a process.

Time stands still while a callback runs and then is the instant of the next one. Callbacks of one
instant run in the order in which they were asked for. So with one seed for everything that throws
dice, a run is a sequence of callbacks that never differs.

Who a callback belongs to is in its context, which tasks hand on to all they start. A process that
is *stopped* keeps its callbacks until it goes on, timers too, as after SIGSTOP; one that is *dead*
loses them. A dead process's tasks are kept until the end, lest the collector of garbage runs their
``finally`` at an instant of its own.
"""

import asyncio
import contextvars
import heapq
import inspect
import itertools
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from pdserve.clock import S

CALLBACKS_MAX = 400_000
"""In one run; far above what the busiest needs. Reaching it means that two parts play ping-pong."""


@dataclass
class HostClock:
    """The wall clock of a host."""

    offset_ms: int = 0  # from the right time


class SimProcess:
    """What can be killed, stopped and continued as a whole."""

    def __init__(self, name: str, host: str, clock: HostClock | None = None) -> None:
        self.name = name
        self.host = host
        self.alive = True
        self.stopped = False
        self.clock = clock or HostClock()
        self.born_offset_ms = self.clock.offset_ms  # of the clock when it began
        self.kept: deque[events.Handle] = deque()  # while it is stopped
        self.on_death: list[Callable[[], None]] = []
        self.context = contextvars.copy_context()
        self.context.run(_CURRENT.set, self)

    def __repr__(self) -> str:
        return self.name


_CURRENT: contextvars.ContextVar[SimProcess | None] = contextvars.ContextVar("process")


def current_process() -> SimProcess | None:
    """Whose callback is running; None: the simulation's own."""
    return _CURRENT.get(None)


class VirtualLoop(asyncio.BaseEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self.now_ns = 0
        self.callback_count = 0
        self.errors: list[str] = []  # exceptions that nobody caught
        self._order = itertools.count()
        self._heap: list[tuple[int, int, events.Handle]] = []
        self._tasks: list[asyncio.Task[Any]] = []
        self._closing = False
        self.network: Any = None

    # ── time ─────────────────────────────────────────────────────────────────────────────────────

    def time(self) -> float:
        return self.now_ns / S

    def run_until(self, done: Callable[[], bool], *, deadline_ns: int) -> bool:
        """Whether ``done`` came to be true before the instant passed or nothing was left."""
        events._set_running_loop(self)
        try:
            while not done():
                if not self._heap or self._heap[0][0] > deadline_ns:
                    self.now_ns = max(self.now_ns, min(deadline_ns, 1 << 62))
                    return done()
                when_ns, _, handle = heapq.heappop(self._heap)
                self.now_ns = max(self.now_ns, when_ns)
                self._run_handle(handle)
            return True
        finally:
            events._set_running_loop(None)

    def _run_handle(self, handle: events.Handle) -> None:
        if handle._cancelled:
            return
        owner = handle._context.get(_CURRENT, None)  # type: ignore[attr-defined]
        if owner is not None and not self._closing:
            if not owner.alive:
                return
            if owner.stopped:
                owner.kept.append(handle)
                return
        self.callback_count += 1
        assert self.callback_count < CALLBACKS_MAX, "nothing settles: parts play ping-pong"
        handle._run()

    # ── processes ────────────────────────────────────────────────────────────────────────────────

    def stop_process(self, process: SimProcess) -> None:
        process.stopped = True

    def continue_process(self, process: SimProcess) -> None:
        process.stopped = False
        for handle in process.kept:
            self._push(self.now_ns, handle)
        process.kept.clear()

    def kill_process(self, process: SimProcess) -> None:
        process.alive = process.stopped = False
        process.kept.clear()
        for on_death in process.on_death:
            on_death()

    def spawn(self, process: SimProcess, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = self.create_task(coroutine, context=process.context)
        return task

    def shut_down(self) -> None:
        """Ends every task, the dead ones' too: nothing may be left for the collector of garbage."""
        self._closing = True
        events._set_running_loop(self)
        try:
            for _ in range(20):
                self._heap.clear()
                pending = [task for task in self._tasks if not task.done()]
                if not pending:
                    break
                for task in pending:
                    task.cancel()
                for _ in range(50):
                    if not self._heap:
                        break
                    for _, _, handle in [heapq.heappop(self._heap) for _ in range(len(self._heap))]:
                        handle._run()
        finally:
            events._set_running_loop(None)
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.exception()  # it is known to whoever had to know
            elif not task.done():
                coroutine: Any = task.get_coro()
                if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                    coroutine.close()  # of a process that died before its turn came
        self._tasks.clear()

    # ── what asyncio asks of a loop ──────────────────────────────────────────────────────────────

    def _push(self, when_ns: int, handle: events.Handle) -> None:
        heapq.heappush(self._heap, (when_ns, next(self._order), handle))

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> events.Handle:  # type: ignore[override]
        handle = events.Handle(callback, args, self, context)
        self._push(self.now_ns, handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        handle = events.TimerHandle(when, callback, args, self, context)
        self._push(max(self.now_ns, round(when * S)), handle)
        return handle

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        return self.call_at(self.now_ns / S + delay, callback, *args, context=context)

    def at(self, when_ns: int, action: Callable[[], None], process: SimProcess | None) -> None:
        """``call_at`` in whole nanoseconds, for a process."""
        context = _NOBODY if process is None else process.context
        self._push(max(self.now_ns, when_ns), events.Handle(action, (), self, context))

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> Any:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._tasks.append(task)
        return task

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        """In no time: what production gives to threads does not wait here."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except BaseException as error:
            future.set_exception(error)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not self._closing:
            is_rule = isinstance(error, AssertionError)
            self.errors.append(str(error) if is_rule else f"{context.get('message')}: {error!r}")

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        """There are no two ways to run it."""

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self._closing

    def _timer_handle_cancelled(self, handle: Any) -> None:
        """It stays where it is, and is passed over."""

    async def create_unix_connection(
        self, protocol_factory: Any, path: Any = None, **_: Any
    ) -> Any:
        return await self.network.connect(protocol_factory, str(path))

    async def create_connection(
        self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any
    ) -> Any:
        return await self.network.connect(protocol_factory, f"{host}:{port}")

    async def create_unix_server(self, protocol_factory: Any, *, sock: Any, **_: Any) -> Any:  # type: ignore[override]
        return self.network.listen(protocol_factory, str(sock))

    async def create_server(
        self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any
    ) -> Any:
        return self.network.listen_tcp(protocol_factory, str(host))


_NOBODY = contextvars.Context()
