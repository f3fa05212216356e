"""Virtual time, seeded chance and virtual sockets under production modules, while a run lasts.

Modules bind their clock when they are imported, so it is replaced wherever it is bound. Found by
identity, in all modules of ``pdserve``: a module that is written tomorrow is covered too. Where the
library's ``time`` or ``secrets`` is used by its name, the module gets one of ours.
"""

import contextlib
import random
import secrets as real_secrets
import sys
import time as real_time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from pdserve import clock
from pdserve.clock import MS, S
from tests.simulation.loop import SimProcess, VirtualLoop, current_process
from tests.simulation.network import no_socket, peer_of
from tests.simulation.owners import OwnedPool

UNIX_ZERO_MS = 1_700_000_000_000
"""Wall time when a run begins."""


class SimTime:
    """As much of the module ``time`` as anybody uses."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def monotonic_ns(self) -> int:
        return self._loop.now_ns

    perf_counter_ns = monotonic_ns

    def monotonic(self) -> float:
        return self._loop.now_ns / S

    perf_counter = monotonic

    def time_ns(self) -> int:
        return (UNIX_ZERO_MS + _offset_ms()) * MS + self._loop.now_ns

    def time(self) -> float:
        return self.time_ns() / S

    def unix_ms(self) -> int:
        return self.time_ns() // MS

    def steady_unix_ms(self) -> int:
        return steady_unix_ms(current_process(), self._loop.now_ns)

    def steady_unix_us(self) -> int:
        now_ns = self._loop.now_ns
        return steady_unix_ms(current_process(), now_ns) * 1000 + now_ns % MS // 1000

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"time.{name}: virtual time does not have it")


def _offset_ms() -> int:
    process = current_process()
    return 0 if process is None else process.clock.offset_ms


def steady_unix_ms(process: SimProcess | None, now_ns: int) -> int:
    """As ``pdserve.clock`` has it: by the clock of its host as that was set when it began."""
    born_ms = 0 if process is None else process.born_offset_ms
    return UNIX_ZERO_MS + born_ms + now_ns // MS


class SimSecrets:
    def __init__(self, dice: random.Random) -> None:
        self._dice = dice

    def token_hex(self, count: int = 16) -> str:
        return self._dice.randbytes(count).hex()

    def token_bytes(self, count: int = 16) -> bytes:
        return self._dice.randbytes(count)

    def randbits(self, count: int) -> int:
        return self._dice.getrandbits(count)


class InlineExecutor:
    """In the place of a thread pool: what is submitted has been done when ``submit`` returns."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, function: Any, *args: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self, *_: object, **__: object) -> None:
        pass


@contextlib.contextmanager
def virtual(
    loop: VirtualLoop,
    dice: random.Random,
    build_parts: Any,
    watch: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """``build_parts`` stands in for ``cluster.worker_parts.build_parts``; ``watch`` is put around
    the ``listen`` of links."""
    from pdserve.cluster import link, worker_parts, worker_shell
    from pdserve.engine import device
    from pdserve.wire import connection, listener

    replaced: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    sim_time, sim_secrets = SimTime(loop), SimSecrets(dice)
    instead = {
        id(real_time.monotonic_ns): sim_time.monotonic_ns,
        id(clock.unix_ms): sim_time.unix_ms,
        id(clock.steady_unix_ms): sim_time.steady_unix_ms,
        id(clock.steady_unix_us): sim_time.steady_unix_us,
        id(real_time): sim_time,
        id(real_secrets): sim_secrets,
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("pdserve.") and module is not None:
            for attribute, value in list(vars(module).items()):
                if id(value) in instead:
                    replace(module, attribute, instead[id(value)])
    replace(worker_parts, "build_parts", build_parts)
    replace(worker_shell, "ThreadPoolExecutor", InlineExecutor)
    replace(device, "BlockPool", OwnedPool)
    replace(listener, "bind_unix", lambda directory, name: str(Path(directory) / name))
    replace(connection, "duplicate_of", no_socket)
    replace(connection, "set_up", peer_of)
    replace(link, "listen", watch(vars(link)["listen"]))
    try:
        yield
    finally:
        for owner, name, value in reversed(replaced):
            setattr(owner, name, value)
