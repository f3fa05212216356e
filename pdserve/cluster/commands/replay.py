"""``pdserve kv replay TRACE``: a trace played on a store node, with real bytes, over its protocol.

Each prompt claims its prefix, reads every block it is given and compares the bytes with what was
written, and puts what is missing. Arrivals keep the trace's distances, so many times as fast; who
is late goes on at once. On a node of its own, hits must be exactly the simulation's.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from rich.console import Console

from pdserve.clock import MS, S
from pdserve.cluster.commands.bars import spinner
from pdserve.cluster.kv_stores import address_of
from pdserve.errors import ConfigError
from pdserve.ids import BlockKey
from pdserve.kvstore.child import child_node
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.eviction import EvictionName
from pdserve.kvstore.replay import TracedPrompt, hits_of, read_trace
from pdserve.kvstore.security import Credentials
from pdserve.wire.hosts import local_host_id

CLAIM_MS_P99_MAX = 1.0
"""Bar of a machine that does nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    node: str | None = None
    slots: int = 3000
    block_bytes: int = 64 << 10
    eviction: str = "turns"
    speed: float = 10.0
    requests: int | None = None
    credentials: Credentials = field(default_factory=Credentials)  # for a node on another host


@dataclass(slots=True)
class Played:
    """What one replay saw."""

    prompts: int = 0
    blocks_asked: int = 0
    hits: int = 0
    hits_simulated: int | None = None
    wrong: int = 0  # blocks with other bytes than were written
    bytes_read: int = 0
    bytes_put: int = 0
    late_ms_max: float = 0.0  # behind the trace's own time
    elapsed_s: float = 0.0
    claim_ms_p50: float = 0.0
    claim_ms_p99: float = 0.0

    @property
    def holds(self) -> bool:
        return self.wrong == 0 and self.hits_simulated in (None, self.hits)


def replay(trace: Path, wish: Wish, *, as_json: bool) -> int:
    """The exit status: 1 where a byte was wrong, or hits are not the simulation's."""
    with spinner("playing", Console(stderr=True)):
        played = play(trace, wish)
    if as_json:
        print(json.dumps(as_tree(played), indent=2))
    else:
        print(_told(played))
    return 0 if played.holds else 1


def play(trace: Path, wish: Wish) -> Played:
    if wish.eviction not in get_args(EvictionName):
        raise ConfigError(
            f"--eviction is {wish.eviction!r}, must be one of {', '.join(get_args(EvictionName))}"
        )
    if wish.speed < 0 or min(wish.slots, wish.block_bytes) < 1:
        raise ConfigError("--speed must not be negative, --slots and --block-bytes be positive")
    prompts = read_trace(trace)[: wish.requests]
    if not prompts:
        raise ConfigError(f"{trace} has no prompt with blocks")
    with contextlib.ExitStack() as ending:
        if wish.node is None:
            address = ending.enter_context(
                child_node(
                    *("--eviction", wish.eviction),
                    slot_count=wish.slots,
                    block_bytes=wish.block_bytes,
                )
            )
        else:
            address = address_of(wish.node)
        client = StoreClient(
            address,
            host=local_host_id(),
            owner="replay",
            ssl_context=wish.credentials.ssl_context(server_side=False),
            token=wish.credentials.worker_token(),
        )
        ending.callback(client.close)
        played = _play(client, prompts, wish.speed)
        if wish.node is None:
            chains = (prompt.chain for prompt in prompts)
            simulated = hits_of(chains, wish.slots, cast(EvictionName, wish.eviction))
            played.hits_simulated = sum(simulated)
        return played


def _play(client: StoreClient, prompts: Sequence[TracedPrompt], speed: float) -> Played:
    played = Played(prompts=len(prompts))
    out = bytearray(client.block_bytes)
    claims_ns: list[int] = []
    first_ns, began_ns = prompts[0].at_ns, time.monotonic_ns()
    for prompt in prompts:
        if speed:
            due_ns = began_ns + round((prompt.at_ns - first_ns) / speed)
            behind_ns = time.monotonic_ns() - due_ns
            played.late_ms_max = max(played.late_ms_max, behind_ns / MS)
            if behind_ns < 0:
                time.sleep(-behind_ns / S)
        asked_ns = time.perf_counter_ns()
        claim = client.claim(prompt.chain)
        claims_ns.append(time.perf_counter_ns() - asked_ns)
        played.blocks_asked += len(prompt.chain)
        played.hits += claim.count
        for index in range(claim.count):
            client.read(claim, index, memoryview(out))
            played.wrong += out != content(prompt.chain[index], len(out))
        client.release(claim)
        client.put(prompt.chain, 0, _filler(prompt.chain))
    played.elapsed_s = (time.monotonic_ns() - began_ns) / S
    played.bytes_read = client.counters["bytes_restored"]
    played.bytes_put = client.counters["blocks_put"] * client.block_bytes
    claims_ns.sort()
    played.claim_ms_p50 = claims_ns[len(claims_ns) // 2] / MS
    played.claim_ms_p99 = claims_ns[len(claims_ns) * 99 // 100] / MS
    return played


def content(key: BlockKey, size: int) -> bytes:
    """What the block of this key is filled with: no other has it, at any place."""
    return (key * -(-size // len(key)))[:size]


def _filler(chain: Sequence[BlockKey]) -> Any:
    def fill(index: int, out: memoryview) -> None:
        out[:] = content(chain[index], len(out))

    return fill


def as_tree(played: Played) -> dict[str, Any]:
    names = Played.__slots__
    return {**{name: getattr(played, name) for name in names}, "holds": played.holds}


def _told(played: Played) -> str:
    lines = [
        f"{played.prompts:,} prompts in {played.elapsed_s:,.1f} s, at most "
        f"{played.late_ms_max:,.0f} ms behind the trace",
        f"hits     {played.hits:,} of {played.blocks_asked:,} blocks "
        f"({played.hits / played.blocks_asked:.2%})",
        f"bytes    {played.bytes_read:,} read, {played.bytes_put:,} put, "
        f"{played.wrong:,} blocks with wrong bytes",
        f"claim    p50 {played.claim_ms_p50:.3f} ms, p99 {played.claim_ms_p99:.3f} ms (bar on an "
        f"idle machine: {CLAIM_MS_P99_MAX:g} ms)",
    ]
    if played.hits_simulated is not None:
        verdict = "the same" if played.hits_simulated == played.hits else "NOT the same"
        lines.insert(2, f"         the simulation has {played.hits_simulated:,}: {verdict}")
    return "\n".join(lines)
