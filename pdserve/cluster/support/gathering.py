"""Asks every source of the bundle, each within its own time, one after the other."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pdserve.clock import Clock, S
from pdserve.cluster.http_client import get_json, get_text
from pdserve.cluster.support import logs
from pdserve.cluster.support.archive import Gathered
from pdserve.cluster.support.redacting import (
    settings_without_secrets,
    text_without_secrets,
    tree_without_secrets,
)
from pdserve.config import ClusterConfig
from pdserve.errors import PdserveError

HTTP_S_MAX = 15.0
DOCTOR_S_MAX = 90.0
STORES_S_MAX = 20.0
LOGS_S_MAX = 20.0
REASON_CHARACTERS_MAX = 500


@dataclass(frozen=True, slots=True)
class Source:
    """Whom to ask, and for how long at most."""

    name: str
    ask: Callable[[], Sequence[tuple[str, str]]]  # (name in the bundle, text) each
    seconds_max: float


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line said."""

    config: ClusterConfig
    url: str
    nodes: Sequence[str] = ()
    log_directories: Sequence[Path] = ()  # none: those of Ray on this host
    doctor_arguments: Sequence[str] | None = ()  # as `pdserve doctor` takes them; None: not asked
    known: Collection[str] = ()  # secrets by value


def sources_of(wish: Wish) -> list[Source]:
    """In the order of their use to a reader: what comes last is the first to be cut."""

    def json_at(path: str) -> Callable[[], Sequence[tuple[str, str]]]:
        def ask() -> Sequence[tuple[str, str]]:
            told = get_json(wish.url, path, timeout_s=HTTP_S_MAX)
            return [("", _as_text(tree_without_secrets(told, wish.known)))]

        return ask

    def metrics() -> Sequence[tuple[str, str]]:
        told = get_text(wish.url, "/metrics", timeout_s=HTTP_S_MAX)
        return [("", text_without_secrets(told, wish.known))]

    def settings() -> Sequence[tuple[str, str]]:
        return [("", _as_text(settings_without_secrets(wish.config)))]

    return [
        Source("versions.json", lambda: [("", _as_text(versions()))], 10.0),
        Source("settings.json", settings, 10.0),
        Source("status.json", json_at("/cluster/status"), HTTP_S_MAX),
        Source("autoscaling.json", json_at("/cluster/autoscaling"), HTTP_S_MAX),
        Source("metrics.txt", metrics, HTTP_S_MAX),
        Source("kv.json", lambda: [("", _stores(wish))], STORES_S_MAX),
        Source("doctor.txt", lambda: [("", _doctor(wish))], DOCTOR_S_MAX),
        Source("logs", lambda: list(_logs(wish)), LOGS_S_MAX),
    ]


def gather(
    sources: Sequence[Source],
    *,
    seconds_max: float,
    clock: Clock,
    done: Callable[[str], None] = lambda _: None,
    known: Collection[str] = (),
) -> Iterator[Gathered]:
    """What came of each. A source that is not done in its time is left alone: it goes on in a
    thread that nothing waits for, and ends with the process."""
    until_ns = clock() + round(seconds_max * S)
    for source in sources:
        begun_ns = clock()
        left_s = min(source.seconds_max, (until_ns - begun_ns) / S)
        if left_s <= 0:
            yield Gathered(source.name, missing=f"{seconds_max:g} s in all were over")
            continue
        result = _asked(source, left_s)
        took_s = round((clock() - begun_ns) / S, 3)
        if isinstance(result, str):
            reason = text_without_secrets(result, known)[:REASON_CHARACTERS_MAX]
            yield Gathered(source.name, missing=reason, took_s=took_s)
        for name, text in [] if isinstance(result, str) else result:
            yield Gathered(name or source.name, text.encode(), took_s=took_s)
        done(source.name)


def _asked(source: Source, seconds: float) -> Sequence[tuple[str, str]] | str:
    """What it gave, or the reason why nothing."""
    answers: list[Sequence[tuple[str, str]] | str] = []

    def ask() -> None:
        try:
            answers.append(source.ask())
        except PdserveError as error:
            answers.append(str(error))
        except Exception as error:  # a broken part must not cost the others
            answers.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=ask, name=f"bundle {source.name}", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else f"no answer within {seconds:.0f} s"


def versions() -> dict[str, Any]:
    """Of what runs here. Imports none of it."""
    try:
        asked = importlib.metadata.requires("pdserve") or []
    except importlib.metadata.PackageNotFoundError:
        asked = []
    names = {"pdserve", *(_package(line) for line in asked if "extra ==" not in line)}
    return {
        "packages": {name: _version(name) for name in sorted(names)},
        "python": sys.version,
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": _memory(),
        "nvidia_driver": _first_line(Path("/proc/driver/nvidia/version")),
    }


def _package(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> dict[str, str]:
    lines = Path("/proc/meminfo").read_text().splitlines()[:3]
    return {name: amount.strip() for name, _, amount in (line.partition(":") for line in lines)}


def _first_line(path: Path) -> str | None:
    return path.read_text().splitlines()[0] if path.exists() else None


def _stores(wish: Wish) -> str:
    from pdserve.cluster.kv_stores import stores_of
    from pdserve.kvstore.security import credentials_of

    with stores_of(wish.url, wish.nodes, credentials_of(wish.config.store)) as stores:
        reports = [
            {"store": store.name, "host": store.host, **asdict(store.admin.report())}
            for store in stores
        ]
    return _as_text(tree_without_secrets(reports, wish.known))


def _doctor(wish: Wish) -> str:
    """In a process of its own: it loads torch, and can be ended."""
    if wish.doctor_arguments is None:
        raise PdserveError("left out by --no-doctor")
    ran = subprocess.run(
        [sys.executable, "-m", "pdserve.cluster.cli", "doctor", *wish.doctor_arguments],
        capture_output=True,
        text=True,
        timeout=DOCTOR_S_MAX,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return text_without_secrets(ran.stdout + ran.stderr, wish.known)


def _logs(wish: Wish) -> Iterator[tuple[str, str]]:
    directories = list(wish.log_directories) or logs.log_directories()
    if not directories:
        raise PdserveError("no logs of Ray are on this host; name their directory with --logs")
    why: list[str] = []
    found = []
    for name, text in logs.tails(directories):
        why += logs.why_lines(text, wish.known)
        found.append((name, logs.clean(text, wish.known)))
    if why:
        yield "why.jsonl", "\n".join(why[-logs.WHY_LINES_MAX :]) + "\n"
    yield from found


def _as_text(tree: Any) -> str:
    return json.dumps(tree, indent=1, ensure_ascii=False, default=str) + "\n"
