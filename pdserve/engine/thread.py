"""The thread that steps an engine loop: steps while there is work, sleeps while there is none.

It sleeps on a condition that messages and finished moves notify, so an idle worker costs nothing
and a message costs no polling interval. A loop that raises is not restarted here: the error is
kept, ``alive`` turns false, and supervision replaces the worker.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from pdserve.clock import Clock, monotonic
from pdserve.engine.hang_watch import HangWatch
from pdserve.engine.outputs import Load, Loop, Output
from pdserve.errors import QueueFull

log = logging.getLogger(__name__)

INBOX_MAX = 8192
"""Messages not yet taken: far above what a router has outstanding at one worker."""


class EngineThread:
    def __init__(
        self,
        loop: Loop,
        emit: Callable[[list[Output], Load], None],
        *,
        name: str,
        clock: Clock = monotonic,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts at once. ``first`` is called on this thread before anything else, ``emit`` after
        each step that said something or changed the load."""
        self.error: BaseException | None = None
        self._loop = loop
        self._emit = emit
        self._first = first
        self._clock = clock
        self._inbox: deque[object] = deque()
        self._news = threading.Condition()
        self._woken = self._draining = self._stopping = False
        self._step_began_ns: int | None = None
        self._last_step_ns = clock()
        self._said: Load | None = None
        self._watch = HangWatch()
        loop.wake_by(self._wake)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.error is None

    def submit(self, message: object) -> None:
        """From any thread.

        Raises:
            QueueFull: ``INBOX_MAX`` messages wait already; the loop hangs, or is dead.
        """
        with self._news:
            if len(self._inbox) >= INBOX_MAX:
                raise QueueFull(
                    f"{INBOX_MAX} messages wait for {self._thread.name} already",
                    retry_after_ms=1000,
                )
            self._inbox.append(message)
            self._news.notify()

    def drain(self) -> None:
        """From any thread: after the messages that wait, take nothing new."""
        with self._news:
            self._draining = True
            self._news.notify()

    def stop(self, *, timeout_s: float) -> None:
        """Ends after the step that runs, and closes the loop. Twice is once."""
        with self._news:
            self._stopping = True
            self._news.notify()
        self._thread.join(timeout_s)

    def last_step_ns(self) -> int:
        """When the last step ended."""
        return self._last_step_ns

    def stuck_ns(self) -> int:
        """For how long the step now running has run; 0 between steps."""
        began_ns = self._step_began_ns
        return 0 if began_ns is None else self._clock() - began_ns

    def hangs(self) -> bool:
        """Whether the step now running does nothing any more; to be asked a few times a second."""
        thread = self._thread
        if thread.ident is None or thread.native_id is None or not thread.is_alive():
            return False
        return self._watch.observe(
            self._step_began_ns,
            time.clock_gettime_ns(time.pthread_getcpuclockid(thread.ident)),
            self._clock(),
            waits_for_child=_has_children(thread.native_id),
        )

    def _wake(self) -> None:
        with self._news:
            self._woken = True
            self._news.notify()

    def _run(self) -> None:
        try:
            self._first()
            while self._take_news():
                self._step_began_ns = self._clock()
                outputs = self._loop.step()
                self._last_step_ns, self._step_began_ns = self._clock(), None
                load = self._loop.load()
                if outputs or load != self._said:
                    self._emit(outputs, load)
                    self._said = load.without_deltas()
        except BaseException as error:
            self.error = error
            log.exception("%s ends", self._thread.name)
        finally:
            self._loop.close()

    def _take_news(self) -> bool:
        """Hands messages to the loop; waits while there is nothing to do. False: stop."""
        busy = self._loop.busy()
        with self._news:
            while not (busy or self._inbox or self._woken or self._draining or self._stopping):
                self._news.wait()
            if self._stopping:
                return False
            messages: Sequence[object] = tuple(self._inbox)
            self._inbox.clear()
            draining = self._draining
            self._woken = self._draining = False
        for message in messages:
            self._loop.handle(message)
        if draining:
            self._loop.drain()
        return True


def _has_children(thread: int) -> bool:
    """Whether a process that this thread started is running."""
    try:
        return bool(Path(f"/proc/self/task/{thread}/children").read_bytes())
    except OSError:  # not every kernel tells
        return False
