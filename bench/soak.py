"""``python -m bench.soak --minutes M``: what grows while a cluster serves, and what stays behind.

A cluster of our own on the small test model, with its state in a Redis, under the steady load of
``bench.soak_load``; every process of it is looked at every few seconds. After a warm-up a line is
fitted to its resident memory less what it shares, with the 95 % interval of its slope. What is
counted (open files, threads, tasks, shared memory, keys in Redis, Ray actors) is compared before
and after, at rest.

    slope      MB per minute of one process. It grows if the interval lies above 0 and the slope
               above ``SLOPE_MAX``. A short run says little: the interval shows how much.
    leaks      counts at rest that are larger after than before

The anchor is a peer's own endurance test, which expects 22 to 32 MB per minute of its front end.
"""

import argparse
import math
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import redis

from bench.frame import Options, Row
from bench.frame import run as run_bench
from bench.soak_load import meet_every_length, serve_for
from pdserve.cluster.chaos.run import held_at_rest
from pdserve.cluster.chaos.targets import by_role, processes
from pdserve.cluster.http_client import get_json, get_text

MB = 1 << 20
LOOK_S = 2.0
ANSWERS_PER_MIN = 50_000 / 60
WARM_UP_SHARE = 1 / 3
"""Of the run: what is allocated once, and caches that fill, are not growth."""

PEAK = 4
"""Times the rate, while it warms up."""

SLOPE_MAX = 0.1
SEED = 7
RESIDENT = re.compile(r"^Rss(?:Anon|File):\s+(\d+) kB$", re.MULTILINE)
"""What is a process's own. The store's arena is one file in shared memory, taken as a whole before
it is used; that each process comes to touch all of its pages is not growth."""
TASKS = re.compile(r"^pdserve_event_loop_tasks\S* (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Slope:
    """A line through (minutes, MB)."""

    per_min: float
    low: float  # of the interval in which it lies with 95 %
    high: float


def fit(points: Sequence[tuple[float, float]]) -> Slope | None:
    """Least squares; the interval by Student's t, and as if points were independent. None: fewer
    than three, or all at one instant."""
    if len(points) < 3:
        return None
    xs, ys = zip(*points, strict=True)
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    if spread == 0:
        return None
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    residual = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    freedom = len(points) - 2
    margin = student_95(freedom) * math.sqrt(residual / freedom / spread)
    return Slope(slope, slope - margin, slope + margin)


def student_95(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t: the expansion of Cornish and Fisher, exact to 1 %
    from three degrees of freedom on; below, from the table."""
    assert freedom > 0
    if freedom < 3:
        return (12.706, 4.303)[freedom - 1]
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


@dataclass(frozen=True, slots=True)
class Look:
    """One process at one instant."""

    rss_mb: float
    files: int
    threads: Counter[str]  # by name


def look_at(pid: int) -> Look | None:
    """None: it is gone."""
    proc = Path(f"/proc/{pid}")
    with suppress(OSError, ValueError, IndexError):
        resident = RESIDENT.findall((proc / "status").read_text())
        return Look(
            sum(map(int, resident)) / 1024,
            len(list((proc / "fd").iterdir())),
            Counter((task / "comm").read_text().strip() for task in (proc / "task").iterdir()),
        )
    return None


def look_at_all(pids: Iterable[int]) -> dict[int, Look]:
    """Of those that are there."""
    return {pid: look for pid in pids if (look := look_at(pid)) is not None}


class Watch:
    """Looks at the cluster's processes, every ``LOOK_S``, until it is closed."""

    def __init__(self, pids: Mapping[int, str]) -> None:
        self._pids = pids
        self.points: dict[int, list[tuple[float, float]]] = defaultdict(list)
        self._over = threading.Event()
        self._began_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(LOOK_S):
            minute = (time.monotonic() - self._began_s) / 60
            for pid, look in look_at_all(self._pids).items():
                self.points[pid].append((minute, look.rss_mb))

    def close(self) -> None:
        self._over.set()
        self._thread.join()


@dataclass(frozen=True, slots=True)
class Counts:
    files: int
    threads: int
    processes: int
    tasks: int | None
    shared_files: int
    redis_keys: int
    actors: int


def count(looks: Mapping[int, Look], url: str, kept: redis.Redis) -> Counts:
    """At rest."""
    from ray.util import list_named_actors

    shared = Path(f"/dev/shm/pdserve-{os.getuid()}")
    return Counts(
        files=sum(look.files for look in looks.values()),
        threads=sum(look.threads.total() for look in looks.values()),
        processes=len(pids_of(url)),
        tasks=tasks_in(url),
        redis_keys=kept.dbsize(),
        shared_files=sum(1 for _ in shared.rglob("*")) if shared.is_dir() else 0,
        actors=len(list_named_actors(all_namespaces=True)),
    )


def pids_of(url: str) -> dict[int, str]:
    """Of prefill, decode, router, gateway and store, by what they are."""
    roles = by_role(get_json(url, "/cluster/status")["workers"], processes())
    return {pid: role for role, pids in roles.items() for pid in pids}


def tasks_in(url: str) -> int | None:
    """Of the event loops of all processes. None: nobody says so."""
    counts = TASKS.findall(get_text(url, "/metrics"))
    return round(sum(map(float, counts))) if counts else None


@contextmanager
def small_cluster() -> Iterator[tuple[str, redis.Redis]]:
    from dataclasses import replace

    from pdserve.cluster.local import local_cluster
    from pdserve.config import ClusterConfig, GatewayConfig, ModelConfig, PoolConfig, StoreConfig
    from pdserve.model.source import locate
    from tests.models.small import write_small_model
    from tests.redis_server import RedisServer

    with tempfile.TemporaryDirectory(prefix="soak-") as scratch, ExitStack() as ending:
        server = RedisServer(Path(scratch))
        ending.callback(server.kill)
        model = write_small_model(
            Path(scratch) / "model", tokenizer_from=locate(ModelConfig()).path
        )
        pool = PoolConfig(threads=1, pool_blocks=512)
        config = ClusterConfig(
            model=ModelConfig(source=str(model), dtype="float32"),
            prefill=pool,
            decode=replace(pool, replicas=2),
            store=StoreConfig(arena_bytes=128 * MB, redis_url=server.url),
            gateway=GatewayConfig(http_port=0, grpc_port=-1, responses_redis=server.url),
            tcp=False,
        )
        with local_cluster(config, progress=say) as cluster:
            yield cluster.http, redis.Redis.from_url(server.url)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure_for(minutes: float, rate_per_s: float) -> Iterator[Row]:
    with small_cluster() as (url, kept):
        # All is used once: what is taken at a peak, as the pages of a pool or threads for waiting,
        # is taken before anybody looks.
        meet_every_length(url, seed=SEED)
        serve_for(url, min(1.0, minutes / 4), rate_per_s=PEAK * rate_per_s, seed=0)
        held_at_rest(url)
        pids = pids_of(url)
        looks_before = look_at_all(pids)
        before = count(looks_before, url, kept)
        watch = Watch(pids)
        counts = serve_for(url, minutes, rate_per_s=rate_per_s, seed=SEED)
        watch.close()
        held = held_at_rest(url)
        looks_after = look_at_all(pids)
        after = count(looks_after, url, kept)
        say_grown(pids, looks_before, looks_after)
        failed = {what: times for what, times in counts.items() if what.startswith("failed")}
        for what, times in failed.items():
            say(f"{times} × {what}")
        answers, wanted = counts.total() - sum(failed.values()), round(minutes * ANSWERS_PER_MIN)
        yield Row("requests", answers, "", bar=f"≥ {wanted:,}", holds=answers >= wanted)
        yield Row("failed requests", sum(failed.values()), "", bar="≤ 0", holds=not failed)
        for pid, role in sorted(pids.items(), key=lambda item: item[1]):
            yield slope_row(role, pid, watch.points[pid], minutes)
        for name in Counts.__slots__:
            was, now = getattr(before, name), getattr(after, name)
            title = f"{name.replace('_', ' ')} at rest"
            if was is None or now is None:
                yield Row(title, None, "", skipped="the cluster does not say")
                continue
            yield Row(title, now, "", "before", was, bar="≤ its value", holds=now <= was)
        left = sum(held.values())
        yield Row("held at rest", left, "", bar="≤ 0", holds=left == 0)


def say_grown(
    pids: Mapping[int, str], before: Mapping[int, Look], after: Mapping[int, Look]
) -> None:
    """Which processes have more files or threads than they had."""
    for pid in before.keys() & after.keys():
        was, now = before[pid], after[pid]
        if now.files > was.files:
            say(f"{pids[pid]} {pid}: {was.files} files, then {now.files}")
        for name, more in (now.threads - was.threads).items():
            say(f"{pids[pid]} {pid}: {more} more threads of the name {name}")


def slope_row(role: str, pid: int, points: Sequence[tuple[float, float]], minutes: float) -> Row:
    warm = [point for point in points if point[0] >= minutes * WARM_UP_SHARE]
    name = f"growth of {role} {pid}"
    slope = fit(warm)
    if slope is None:
        return Row(name, None, "MB/min", skipped="the process was replaced, or the run too short")
    return Row(
        name,
        slope.per_min,
        "MB/min",
        bar=f"≤ {SLOPE_MAX:g} MB/min, or not above 0 with 95 %",
        holds=slope.per_min <= SLOPE_MAX or slope.low <= 0,
        spread=(slope.low, slope.high),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=60.0, help="of load")
    parser.add_argument("--rate", type=float, default=15.0, help="requests per second")


def measure(options: Options) -> Iterator[Row]:
    minutes = 1.0 if options.quick else options.arguments.minutes
    return measure_for(minutes, options.arguments.rate)


if __name__ == "__main__":
    run_bench("soak", measure, add_arguments=add_arguments)
