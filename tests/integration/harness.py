"""A real cluster for tests: Ray, Serve, sockets, shared memory; only the model is small.

``running(config)`` is ``pdserve serve`` without the terminal. What tests look at from outside: the
HTTP API, ``/cluster/status`` (the router's snapshot with every worker's counters), process ids.

A start costs some twenty seconds of processor time, a third of it Ray's own. So Ray starts once for
a whole run of tests and clusters come and go on it, each its own Serve with its own processes; and
``shared(config)`` keeps a cluster for all tests that want the same settings.
"""

import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from pdserve.cluster.http_client import post_json
from pdserve.cluster.local import APP, OBJECT_STORE_BYTES, LocalCluster, local_cluster
from pdserve.cluster.own_ray import kill_all_that_name
from pdserve.config import ClusterConfig
from pdserve.messages import Sampling
from pdserve.settings import from_tree

WAIT_S = 60.0
RAY_STARTS_MAX = 3
"""It gives itself 30 s, which is not always enough where others use both cores."""
RAY_JOB_CONFIG_JSON_ENV_VAR = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@dataclass(frozen=True, slots=True)
class TestCluster:
    __test__ = False  # pytest: not a test class

    cluster: LocalCluster
    config: ClusterConfig

    @property
    def url(self) -> str:
        return self.cluster.http

    def status(self) -> dict[str, Any]:
        """Asked again while no router leads."""
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/cluster/status", timeout=10) as answer:
                    snapshot: dict[str, Any] = json.load(answer)
                    return snapshot
            except urllib.error.HTTPError as error:
                if error.code != 503 or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def workers(self, role: str) -> list[dict[str, Any]]:
        return [w for w in self.status()["workers"] if w["role"] == role]

    def pids(self, role: str) -> list[int]:
        return [w["pid"] for w in self.workers(role)]

    def counter(self, role: str, name: str) -> int:
        """Summed over the role's workers that live."""
        return sum(w["counters"].get(name, 0) for w in self.workers(role))

    def complete(self, prompt: Sequence[int] | str, **fields: Any) -> dict[str, Any]:
        body = {"prompt": list(prompt) if not isinstance(prompt, str) else prompt, **fields}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()
        return result

    def tokens(self, prompt: Sequence[int], count: int, **fields: Any) -> list[int]:
        """Generated token ids."""
        return asyncio.run(stream_tokens(self.url, prompt, count, **fields)).tokens


@dataclass(slots=True)
class Stream:
    """One streamed completion as a client saw it."""

    tokens: list[int]
    first_s: float | None = None  # after sending
    ended_s: float = 0.0
    pause_s: float = 0.0  # the longest between two tokens
    finish: str | None = None
    error: str | None = None
    cached_tokens: int = 0
    timing: dict[str, Any] | None = None


async def stream_tokens(
    url: str,
    prompt: Sequence[int],
    count: int,
    *,
    on_token: Callable[[int], None] | None = None,
    client: httpx.AsyncClient | None = None,
    **fields: Any,
) -> Stream:
    """A streamed completion by token ids, ignoring the end-of-sequence token."""
    body = {
        "prompt": list(prompt),
        "max_tokens": count,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "include_timing": True,
        **fields,
    }
    result = Stream([])
    begun = time.monotonic()
    latest_s = 0.0
    async with contextlib.AsyncExitStack() as stack:
        if client is None:
            client = await stack.enter_async_context(httpx.AsyncClient(timeout=300))
        answer = await stack.enter_async_context(
            client.stream("POST", f"{url}/v1/completions", json=body)
        )
        if answer.status_code != 200:
            result.error = (await answer.aread()).decode()
            return result
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                result.error = json.dumps(event["error"])
                break
            for choice in event["choices"]:
                for token in choice.get("token_ids") or ():
                    now_s = time.monotonic() - begun
                    if result.first_s is None:
                        result.first_s = latest_s = now_s
                    result.pause_s = max(result.pause_s, now_s - latest_s)
                    latest_s = now_s
                    result.tokens.append(token)
                    if on_token is not None:
                        on_token(len(result.tokens))
                result.finish = choice.get("finish_reason") or result.finish
            if event.get("usage"):
                details = event["usage"].get("prompt_tokens_details") or {}
                result.cached_tokens = details.get("cached_tokens", 0)
            result.timing = event.get("pdserve") or result.timing
    result.ended_s = time.monotonic() - begun
    return result


def random_prompts(count: int, *, seed: int, length: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(20, 40_000) for _ in range(length)] for _ in range(count)]


def storm(
    cluster: TestCluster,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    at: int | None = None,
    strike: Callable[[], None] | None = None,
) -> list[Stream]:
    """All prompts at once, drawn as ``storm_samplings`` says; ``strike`` when ``at`` tokens have
    come in all."""
    seen = 0

    def on_token(_: int) -> None:
        nonlocal seen
        seen += 1
        if seen == at and strike is not None:
            strike()

    async def all_of_them() -> list[Stream]:
        async with httpx.AsyncClient(timeout=300) as client:
            return await asyncio.gather(
                *(
                    stream_tokens(
                        cluster.url,
                        prompt,
                        count,
                        client=client,
                        on_token=on_token,
                        temperature=sampling.temperature,
                        seed=index,
                        presence_penalty=sampling.presence_penalty,
                    )
                    for index, (prompt, sampling) in enumerate(
                        zip(prompts, storm_samplings(len(prompts)), strict=True)
                    )
                )
            )

    return asyncio.run(all_of_them())


def storm_samplings(count: int) -> list[Sampling]:
    """Half of them seeded, by their index; some with a penalty."""
    return [
        Sampling(
            temperature=0.8 if index % 2 else 0.0,
            presence_penalty=0.5 if index % 3 == 0 else 0.0,
        )
        for index in range(count)
    ]


def assign_role(cluster: TestCluster, worker: str, role: str) -> None:
    """Raises PdserveError where the router refuses."""
    post_json(cluster.url, "/cluster/role", {"worker": worker, "role": role})


def settings(source: Path | str, **parts: Any) -> ClusterConfig:
    """Small pools, free ports, one thread a worker: what a test on two cores can afford."""
    tree: dict[str, Any] = {
        "model": {"source": str(source)},
        "prefill": {"threads": 1, "pool_blocks": 512},
        "decode": {"threads": 1, "pool_blocks": 512},
        "store": {"arena_bytes": 128 << 20},
        "gateway": {"http_port": 0, "grpc_port": 0},
        "router": {"router_silence_ms": 20_000},  # a busy machine is no hanging router
        "tcp": False,
    }
    for part, fields in parts.items():
        if isinstance(fields, dict):
            tree[part] = {**tree.get(part, {}), **fields}
        else:
            tree[part] = fields
    return from_tree(tree)


@contextlib.contextmanager
def running(
    config: ClusterConfig,
    *,
    ray_address: str | None = None,
    own_ray: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Iterator[TestCluster]:
    """``config`` served, on the run's Ray unless another is named.

    Args:
        own_ray: on a Ray that begins and ends with it, as for `pdserve serve`.
        environment: more variables for every process of the cluster.
    """
    end_shared()  # a process is the driver of one Ray at a time
    if own_ray:
        end_ray()
    elif ray_address is None:
        ray_address = ray_address_of_the_run()
    with contextlib.ExitStack() as stack:
        if environment is not None:
            stack.enter_context(_job_environment(environment))
        yield TestCluster(
            stack.enter_context(local_cluster(config, ray_address=ray_address)), config
        )


_shared: list[tuple[TestCluster, contextlib.ExitStack]] = []


def shared(config: ClusterConfig, *, environment: Mapping[str, str] | None = None) -> TestCluster:
    """A cluster that stays up for the next test that asks for the same, until one asks for another
    or for a cluster of its own. Arguments are those of ``running``."""
    if _shared and _shared[0][0].config != config:
        end_shared()
    if not _shared:
        stack = contextlib.ExitStack()
        cluster = stack.enter_context(running(config, environment=environment))
        _shared.append((cluster, stack))
    return _shared[0][0]


def end_shared() -> None:
    while _shared:
        _, stack = _shared.pop()
        stack.close()


_ray: list[tuple[str, contextlib.ExitStack]] = []


def ray_address_of_the_run() -> str:
    """Of the run's Ray, which is started if need be."""
    from ray._common.utils import get_default_ray_temp_dir
    from ray.cluster_utils import Cluster

    if not _ray:
        os.environ["RAY_AUTH_MODE"] = "disabled"
        # Its ``Cluster`` notes its address in Ray's usual directory, wherever its own is.
        Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)
        stack = contextlib.ExitStack()
        for attempt in range(RAY_STARTS_MAX):
            directory = tempfile.mkdtemp(prefix="pd-", dir="/tmp")
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            cluster = Cluster()
            stack.callback(cluster.shutdown)
            try:
                cluster.add_node(
                    num_cpus=len(os.sched_getaffinity(0)),
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    temp_dir=f"{directory}/r",
                )
            except Exception as error:  # Ray's own type for "timed out during startup"
                print(f"Ray did not start, attempt {attempt + 1}: {error}")
                kill_all_that_name(Path(directory))
                stack.close()
            else:
                _ray.append((cluster.address, stack))
                break
    assert _ray, f"Ray did not start in {RAY_STARTS_MAX} attempts"
    return _ray[0][0]


def end_ray() -> None:
    """After it, nothing of a cluster runs in this process's name."""
    end_shared()
    while _ray:
        _, stack = _ray.pop()
        stack.close()


@contextlib.contextmanager
def _job_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """What Ray's own job submission uses: every process of the next driver's job gets these."""
    os.environ[RAY_JOB_CONFIG_JSON_ENV_VAR] = json.dumps(
        {"runtime_env": {"env_vars": dict(variables)}}
    )
    try:
        yield
    finally:
        del os.environ[RAY_JOB_CONFIG_JSON_ENV_VAR]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(what: str, condition: Callable[[], bool], *, timeout_s: float = WAIT_S) -> None:
    """Looks until ``condition`` holds; fails with ``what`` was waited for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def wait_until_equal(
    what: str, actual: Callable[[], object], expected: object, *, timeout_s: float = 10.0
) -> None:
    """Reports lag by up to a second: looks until they say ``expected``, or fails with both."""
    deadline = time.monotonic() + timeout_s
    while (last := actual()) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert last == expected, f"{what}: {last} is not {expected}"


def held(cluster: TestCluster) -> int:
    """Whatever a request can hold, anywhere: 0 at rest."""
    status = cluster.status()
    total = (
        sum(status["queue_lengths"])
        + status["parked"]
        + sum(
            count
            for phase, count in status["phases"].items()
            if phase not in ("finished", "aborted", "failed")
        )
    )
    for worker in status["workers"]:
        total += worker["running"] + worker["waiting"]
        total += worker["block_count"] - worker["free_blocks"]
        total += worker["counters"].get("store_pinned", 0) + worker["counters"].get(
            "store_tickets", 0
        )
    return int(total)


def processes(mark: str) -> list[int]:
    """Those that this process started, themselves or further down, with ``mark`` in their command
    line. Ray writes an actor's name there."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has just ended
                status = (entry / "stat").read_text().rpartition(")")[2].split()
                if status[0] != "Z":
                    parents[int(entry.name)] = int(status[1])
                    commands[int(entry.name)] = (entry / "cmdline").read_text()
    ours = {os.getpid()}
    while new := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= new
    return sorted(pid for pid in ours - {os.getpid()} if mark in commands[pid].replace("\0", " "))


@dataclass(frozen=True, slots=True)
class Traces:
    """What running clusters have on this machine: processes, shared memory, directories."""

    pids: tuple[int, ...]
    paths: tuple[Path, ...]

    @classmethod
    def of_this_process(cls) -> "Traces":
        paths = set[Path]()
        for node in processes("pdserve.kvstore.node"):
            maps = Path(f"/proc/{node}/maps").read_text().splitlines()
            paths |= {Path(line.split()[-1]).parent for line in maps if "/dev/shm/" in line}
            words = Path(f"/proc/{node}/cmdline").read_text().split("\0")
            paths.add(Path(words[words.index("--directory") + 1]).parent)
        return cls(tuple(processes("")), tuple(sorted(paths)))

    def remaining(self) -> list[int | Path]:
        return [
            *(pid for pid in self.pids if not gone(pid)),
            *(path for path in self.paths if path.exists()),
        ]


def replicas(deployment: str) -> list[int]:
    """The processes of a deployment."""
    return processes(f"ray::ServeReplica:{APP}:{deployment}")


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
