"""Where a first token's time goes, stage by stage: ``python -m bench.surface --only stages``.

One request at a time passes gateway, router and a worker whose compute is a timed wait. In each of
the processes a few functions note when they are entered or left; all of them read one clock. A
stage is the time from one note to the next, so that the stages of a request add up to what its
client waited.

To note takes about a microsecond, and a request meets some fifteen notes.
"""

import asyncio
import functools
import importlib
import json
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

NS_PER_US = 1000

Stamps = Mapping[str, Sequence[int]]
"""Of each stage of one process: when it ended, in nanoseconds, oldest first."""


@dataclass(frozen=True, slots=True)
class Stage:
    """It ends where ``function``, of a module or of a class, is entered, or left."""

    name: str
    place: str  # the process
    module: str
    function: str
    at_end: bool = False  # of a plain function only


_APP, _SESSION = "pdserve.cluster.http.app", "pdserve.cluster.gateway.session"
_ANSWER, _FLEET = "pdserve.cluster.http.generation", "bench.surface_fleet"

STAGES = (
    Stage(
        "to the gateway", "gateway-0", "pdserve.cluster.http.patience", "PatientHTTP.data_received"
    ),
    Stage("HTTP head read", "gateway-0", "pdserve.cluster.http.request_ids", "RequestIds.__call__"),
    Stage("route found", "gateway-0", _ANSWER, "Generation.__call__"),
    Stage("body parsed", "gateway-0", _APP, "chat_asked"),
    Stage(
        "fields checked, prompt rendered", "gateway-0", "pdserve.text.tokenizer", "Tokenizer.encode"
    ),
    Stage("tokenised", "gateway-0", "pdserve.text.tokenizer", "Tokenizer.encode", at_end=True),
    Stage("call made", "gateway-0", _SESSION, "GatewaySession._check"),
    Stage("keys hashed, request made", "gateway-0", _SESSION, "GatewaySession._post"),
    # What sends ends where sending begins: who receives may be sooner than its way back.
    Stage("to the router", "router", "pdserve.wire.connection", "Connection.buffer_updated"),
    Stage("decided", "router", "pdserve.cluster.router_service", "RouterService._carry_out"),
    Stage("to the worker", "fleet", _FLEET, "Fleet.take"),
    Stage("computed: a timed wait", "fleet", _FLEET, "Fleet._tell"),
    Stage("back to the gateway", "gateway-0", _SESSION, "GatewaySession._on_delta"),
    Stage("text made, stream woken", "gateway-0", _ANSWER, "Answer._told"),
    Stage("event made", "gateway-0", _ANSWER, "Answer._told", at_end=True),
)
LAST = "written, to the client"


@contextmanager
def noting(place: str, file: Path | None) -> Iterator[None]:
    """Within, the stages of a process are noted; at the end they are in ``file``."""
    if file is None:
        yield
        return
    stamps: dict[str, list[int]] = {}
    for stage in STAGES:
        if stage.place == place:
            _note(stage, stamps.setdefault(stage.name, []).append)
    yield
    file.write_text(json.dumps(stamps))


def found(stage: Stage) -> tuple[Any, str, Any]:
    """Where its function is, under what name, and the function."""
    owner: Any = importlib.import_module(stage.module)
    *path, attribute = stage.function.split(".")
    for name in path:
        owner = getattr(owner, name)
    return owner, attribute, getattr(owner, attribute)


def _note(stage: Stage, note: Callable[[int], None]) -> None:
    owner, attribute, function = found(stage)

    @functools.wraps(function)
    def noted(*arguments: Any, **named: Any) -> Any:
        if not stage.at_end:
            note(time.monotonic_ns())
            return function(*arguments, **named)
        result = function(*arguments, **named)
        note(time.monotonic_ns())
        return result

    setattr(owner, attribute, noted)


def stages_of(
    requests: Sequence[tuple[int, int]], stamps: Mapping[str, Stamps]
) -> dict[str, list[float]]:
    """Microseconds of each stage, one per request; a request of which a stage is missing is left
    out. Pure.

    Args:
        requests: when each was sent, and when its first token came, in nanoseconds.
        stamps: by process.
    """
    found: dict[str, list[float]] = {name: [] for name in (*(s.name for s in STAGES), LAST)}
    for sent_ns, came_ns in requests:
        ends = [sent_ns]
        for stage in STAGES:
            noted = stamps[stage.place][stage.name]
            index = bisect_left(noted, ends[-1])
            if index == len(noted) or noted[index] > came_ns:
                break
            ends.append(noted[index])
        else:
            ends.append(came_ns)
            for name, (begin_ns, end_ns) in zip(found, pairwise(ends), strict=True):
                found[name].append((end_ns - begin_ns) / NS_PER_US)
    return found


def read(directory: Path) -> dict[str, Stamps]:
    """What the processes left there, by their names."""
    return {file.stem: json.loads(file.read_text()) for file in directory.glob("*.json")}


def own_us(stages: Mapping[str, Sequence[float]]) -> float:
    """The median of what the gateway itself takes, between its first byte and its last."""
    mine = {stage.name for stage in STAGES if stage.place == "gateway-0"}
    mine -= {"to the gateway", "back to the gateway"}
    return sum(statistics.median(stages[name]) for name in mine)


async def settled() -> None:
    """What the last request left to do is done, so that its notes are nobody else's."""
    await asyncio.sleep(0.01)
