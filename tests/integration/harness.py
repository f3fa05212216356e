"""A real cluster for tests: Ray, Serve, sockets, shared memory; only the model is small.

``running(config)`` is ``pdserve serve`` without the terminal. What tests look at from outside: the
HTTP API, ``/cluster/status`` (the router's snapshot with every worker's counters), process ids.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from pdserve.cluster.local import APP, LocalCluster, end, local_cluster
from pdserve.config import ClusterConfig, from_tree, to_tree

WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class TestCluster:
    __test__ = False  # pytest: not a test class

    cluster: LocalCluster
    config: ClusterConfig

    @property
    def url(self) -> str:
        return self.cluster.http

    def status(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/cluster/status", timeout=10) as answer:
            snapshot: dict[str, Any] = json.load(answer)
            return snapshot

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
    """All prompts at once, half of them seeded; ``strike`` when ``at`` tokens have come in all."""
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
                        temperature=0.8 if index % 2 else 0.0,
                        seed=index,
                        presence_penalty=0.5 if index % 3 == 0 else 0.0,
                    )
                    for index, prompt in enumerate(prompts)
                )
            )

    return asyncio.run(all_of_them())


def settings(source: Path | str, **parts: Any) -> ClusterConfig:
    """Small pools, free ports, one thread a worker: what a test on two cores can afford."""
    tree: dict[str, Any] = {
        "model": {"source": str(source)},
        "prefill": {"threads": 1, "pool_blocks": 512},
        "decode": {"threads": 1, "pool_blocks": 512},
        "store": {"arena_bytes": 128 << 20},
        "gateway": {"http_port": 0, "grpc_port": 0},
        "tcp": False,
    }
    for part, fields in parts.items():
        if isinstance(fields, dict):
            tree[part] = {**tree.get(part, {}), **fields}
        else:
            tree[part] = fields
    return from_tree(tree)


@contextlib.contextmanager
def running(config: ClusterConfig, *, ray_address: str | None = None) -> Iterator[TestCluster]:
    end_shared()  # a process has one Ray at a time
    with local_cluster(config, ray_address=ray_address) as cluster:
        yield TestCluster(cluster, config)


_shared: list[tuple[TestCluster, contextlib.ExitStack]] = []


def shared(config: ClusterConfig) -> TestCluster:
    """A cluster that stays up for the next test that asks, until somebody needs another one."""
    if not _shared:
        stack = contextlib.ExitStack()
        _shared.append((stack.enter_context(running(config)), stack))
    return _shared[0][0]


def end_shared() -> None:
    while _shared:
        _, stack = _shared.pop()
        stack.close()


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


class Deployed(TestCluster):
    """A cluster under `serve deploy`: the real command, on a Ray with its dashboard."""

    __test__ = False

    def deploy(self, *, decode_replicas: int) -> None:
        """Writes the Serve file with another `num_replicas` and deploys it."""
        file = self.cluster.directory / "serve.yaml"
        file.write_text(json.dumps(_serve_file(self.config, decode_replicas)))  # JSON is YAML
        dashboard = self.cluster.grpc  # see ``deployed``
        subprocess.run(
            [Path(sys.executable).with_name("serve"), "deploy", str(file), "-a", dashboard],
            check=True,
            capture_output=True,
            timeout=60,
        )


@contextlib.contextmanager
def deployed(config: ClusterConfig) -> Iterator[Deployed]:
    """`serve deploy` of ``config`` with one decode replica; ``deploy`` changes the number."""
    import ray
    from ray import serve

    end_shared()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    directory = Path(tempfile.mkdtemp(prefix="pd-", dir="/tmp"))
    config = dataclasses.replace(config, directory=str(directory / "s"))
    context = ray.init(
        include_dashboard=True,
        dashboard_port=0,
        object_store_memory=80 << 20,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(directory / "r"),
        _node_ip_address="127.0.0.1",
    )
    try:
        dashboard = f"http://{context.dashboard_url}"
        cluster = Deployed(LocalCluster("", dashboard, directory), config)
        cluster.deploy(decode_replicas=1)
        wait_for("the application to run", _app_runs, timeout_s=120)
        ports = json.loads(serve.get_app_handle(APP).addresses.remote().result(timeout_s=10))
        yield Deployed(
            LocalCluster(f"http://127.0.0.1:{ports['http']}", dashboard, directory), config
        )
    finally:
        end(directory)


def _app_runs() -> bool:
    from ray import serve

    app = serve.status().applications.get(APP)
    assert app is None or app.status != "DEPLOY_FAILED", app
    return app is not None and app.status == "RUNNING"


def _serve_file(config: ClusterConfig, decode_replicas: int) -> dict[str, Any]:
    return {
        "proxy_location": "Disabled",
        "applications": [
            {
                "name": APP,
                "route_prefix": "/",
                "import_path": "pdserve.cluster.app:build",
                "args": to_tree(config),
                "deployments": [{"name": "decode", "num_replicas": decode_replicas}],
            }
        ],
    }
