"""What the key-value peers share: a loop that takes one measurement per line of standard input.

    {"op": "get", "bytes": 1048576, "count": 10}   →   [411.2, 398.0, …]

ten calls, one after the other, each in microseconds. The benchmark asks turn and turn about, so
that a drift of the machine meets everybody. Only what Python brings is imported: each peer has an
environment of its own.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Protocol

RING = 48
"""Values that are kept of each size: what a call reads was written 48 calls ago, and is in no cache
by chance."""


class Store(Protocol):
    """``bytes`` of all values in one measurement are the same; names are short strings."""

    def put(self, name: str, size: int) -> None: ...
    def get(self, name: str, size: int) -> None: ...
    def get_many(self, names: list[str], size: int) -> None: ...
    def present(self, names: list[str]) -> int: ...
    def forget(self, name: str) -> None: ...


class Values:
    """The names that are in the store, by size."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._next = 0
        self._names: dict[int, list[str]] = {}

    def put_us(self, size: int) -> float:
        names = self._names.setdefault(size, [])
        if len(names) >= RING:
            self._store.forget(names.pop(0))
        self._next += 1
        name = f"v{self._next}"
        taken = timed(lambda: self._store.put(name, size))
        names.append(name)
        return taken

    def get_us(self, size: int) -> float:
        name = self._some(1, size)[0]
        return timed(lambda: self._store.get(name, size))

    def get_many_us(self, size: int) -> float:
        names = self._some(10, size)
        return timed(lambda: self._store.get_many(names, size))

    def present_us(self, size: int) -> float:
        """128 names at once."""
        names = (self._some(RING, size) * 3)[:128]
        taken = timed(lambda: check(self._store.present(names), 128))
        return taken

    def _some(self, count: int, size: int) -> list[str]:
        while len(self._names.get(size, ())) < RING:
            self.put_us(size)
        names = self._names[size]
        chosen = names[:count]
        names[:count] = []
        names += chosen
        return chosen


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * 1e6


def check(actual: int, expected: int) -> None:
    if actual != expected:
        raise RuntimeError(f"{actual}, {expected} expected")


def serve(store: Store) -> None:
    """Until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes with their errors

    def say(answer: object) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    values = Values(store)
    operations: Mapping[str, Callable[[int], float]] = {
        "put": values.put_us,
        "get": values.get_us,
        "get_many": values.get_many_us,
        "present": values.present_us,
    }
    say("ready")
    for line in sys.stdin:
        asked = json.loads(line)
        operation = operations[asked["op"]]
        say([operation(asked["bytes"]) for _ in range(asked["count"])])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
