"""How a process of the store lives: it says when it serves, and ends when it is told to.

It is told by SIGTERM, by SIGINT, or by the end of its standard input, that is: of whoever started
it. What it says is one line of JSON on its standard output.
"""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Awaitable, Callable

REPLACED_STATUS = 3
"""A node's exit status when a successor under its own name has its place: nobody is to start it
again under this name, or the two would replace each other for ever."""

Serve = Callable[[asyncio.Event, Callable[[str], None]], Awaitable[None]]
"""``serve(stopped, say_ready)`` returns some time after ``stopped`` is set."""


async def run_until_told(serve: Serve) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stopped.set)

    def wait_for_end_of_input() -> None:
        while os.read(0, 4096):
            pass
        with contextlib.suppress(RuntimeError):  # the loop has ended before the input
            loop.call_soon_threadsafe(stopped.set)

    threading.Thread(target=wait_for_end_of_input, name="input", daemon=True).start()
    await serve(stopped, lambda line: print(line, flush=True))
