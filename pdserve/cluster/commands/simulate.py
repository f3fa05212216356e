"""``pdserve simulate TRACE``: what a configuration would do with a trace, by the router's own
code. One simulation per policy and load. The short table goes to the terminal; a JSON file and an
HTML page with charts are written where asked for.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from pdserve.clock import S
from pdserve.cluster.commands.autoscaled import scaled_table, static_like, static_name
from pdserve.cluster.commands.bars import bar
from pdserve.cluster.commands.mishaps import failures_of
from pdserve.cluster.profiles import Profile, Size, read_profile
from pdserve.cluster.scaler import plan_of
from pdserve.config import ClusterConfig, PoolConfig, StoreConfig
from pdserve.errors import ConfigError
from pdserve.router.costs import believed
from pdserve.router_config import QueuePolicy
from pdserve.simulator.page import page
from pdserve.simulator.report import HEADINGS, SHORT, Case, Goal, as_json, rows
from pdserve.simulator.run import SimulationSettings, simulate
from pdserve.simulator.settings import Autoscaling, Noise
from pdserve.simulator.traces import Trace, load_trace
from pdserve.simulator.transformations import first, repeat, scale_time, spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is asked for beside the configuration."""

    policies: Sequence[str] = ()  # none: the configuration's own
    speeds: Sequence[float] = (1.0,)  # how many times as fast the trace is played
    requests: int | None = None  # the first ones, or the trace over and over; None: as it is
    hosts: int = 1
    seed: int = 0
    ttft_goal_ms: float = 1000.0
    tpot_goal_ms: float = 100.0
    failures: Sequence[str] = ()  # as ``mishaps`` reads them
    autoscale: bool = False  # between ``replicas`` and ``replicas_max``, and pools of the same cost
    start_s: float | None = None  # of a worker; None: ``autoscaling.start_s``
    noise_sigma: float = 0.0  # by how much prefills differ from their prediction: of the logarithm


def run_simulations(
    trace: Path,
    config: ClusterConfig,
    wish: Wish,
    *,
    json_file: Path | None = None,
    html_file: Path | None = None,
) -> None:
    """Prints the table and writes the files.

    Raises:
        ConfigError: a file or a value does not fit; nothing has been simulated then.
    """
    _check(wish)
    profile = profile_of(config)
    settings = settings_of(config, profile, hosts=wish.hosts, seed=wish.seed)
    settings = replace(
        settings,
        failures=failures_of(wish.failures, settings),
        noise=Noise(sigma=wish.noise_sigma),
        autoscaling=_autoscaling(config, wish) if wish.autoscale else None,
    )
    played = _played(load_trace(trace), wish)
    goal = Goal(wish.ttft_goal_ms / 1000, wish.tpot_goal_ms / 1000)
    console = Console(highlight=False)
    costs = f"costs of {profile.costs.name} ({profile.costs.origin})"
    console.print(f"{trace.name}: {len(played.requests):,} requests, {costs}", style="dim")
    cases = _cases(played, settings, wish, console)
    if wish.autoscale:
        console.print(scaled_table(cases, goal))
    console.print(_table(cases, goal))
    if json_file is not None:
        tree = as_json(cases, goal, trace=trace.name, seed=wish.seed)
        _write(json_file, json.dumps(tree, indent=2) + "\n")
    if html_file is not None:
        _write(html_file, page(cases, goal, title=f"Simulation of {trace.name}"))


def settings_of(
    config: ClusterConfig, profile: Profile, *, hosts: int = 1, seed: int = 0
) -> SimulationSettings:
    """The configured cluster; of a worker's size what the profile says, else the configuration."""
    costs, size = profile.costs, profile.size
    return SimulationSettings(
        router=config.router,
        costs=costs.slowed(prefill=profile.prefill_slowdown, decode=profile.decode_slowdown),
        predicted=costs,
        prefill_workers=max(1, config.prefill.replicas),
        decode_workers=max(1, config.decode.replicas),
        hosts=hosts,
        chunk_tokens=size.chunk_tokens or config.prefill.chunk_tokens,
        mixed_chunk_tokens=config.decode.mixed_chunk_tokens,
        double_cost_tokens=size.double_cost_tokens,
        running_max=size.running_max or config.decode.running_max,
        decode_tokens=size.kv_capacity_tokens or _room(config.decode, config, costs.kv_token_bytes),
        cache_tokens=size.kv_capacity_tokens or _room(config.prefill, config, costs.kv_token_bytes),
        store_tokens=(
            config.store.arena_bytes // costs.kv_token_bytes if config.store.offload else 0
        ),
        disk_tokens=_disk_tokens(config.store, costs.kv_token_bytes),
        disk_write=config.store.ssd_write,
        fetches=config.store.master != "off",
        contention=profile.contention,
        timeout_s=config.gateway.request_timeout_s,
        seed=seed,
    )


def _autoscaling(config: ClusterConfig, wish: Wish) -> Autoscaling:
    plan = plan_of(config)
    if all(bounds.least == bounds.most for bounds in plan.bounds.values()):
        raise ConfigError(
            "no pool may scale: set prefill.replicas_max or decode.replicas_max above replicas"
        )
    start_s = plan.settings.start_s if wish.start_s is None else wish.start_s
    return Autoscaling(plan=plan, start_ns=round(start_s * S))


def _room(pool: PoolConfig, config: ClusterConfig, kv_token_bytes: int) -> int:
    if pool.pool_blocks is not None:
        return pool.pool_blocks * config.model.block_tokens
    return max(1, pool.pool_bytes // kv_token_bytes)


def _disk_tokens(store: StoreConfig, kv_token_bytes: int) -> int:
    if not store.offload or store.ssd_directory is None:
        return 0
    return store.ssd_bytes // kv_token_bytes


def profile_of(config: ClusterConfig, name: str | None = None) -> Profile:
    """The one named, or that of the configuration; without either what is believed of a laptop that
    was never measured."""
    named = name or config.router.profile
    return read_profile(named) if named else _believed(config)


def _believed(config: ClusterConfig) -> Profile:
    return Profile(believed(config.router.prefill_tokens_per_s), Size())


def _played(trace: Trace, wish: Wish) -> Trace:
    if wish.requests is None:
        return spread(trace, wish.seed)
    if wish.requests <= len(trace.requests):
        return spread(first(trace, wish.requests), wish.seed)
    return repeat(spread(trace, wish.seed), wish.requests)


def _cases(trace: Trace, settings: SimulationSettings, wish: Wish, console: Console) -> list[Case]:
    cases = []
    policies = wish.policies or (settings.router.policy,)
    each = 1 if settings.autoscaling is None else 2
    with bar("simulating", console, total=len(policies) * len(wish.speeds) * each) as step:
        for policy in policies:
            router: Any = replace(settings.router, policy=policy)  # type: ignore[arg-type]
            for speed in wish.speeds:
                this = replace(settings, router=router)
                cases.append(_case(policy, scale_time(trace, speed), this, speed, console))
                step()
                if settings.autoscaling is not None:
                    static = static_like(this, cases[-1].result)
                    name = static_name(policy, static)
                    cases.append(_case(name, scale_time(trace, speed), static, speed, console))
                    step()
    return cases


def _case(
    name: str, trace: Trace, settings: SimulationSettings, speed: float, console: Console
) -> Case:
    begun_s = time.monotonic()
    result = simulate(trace, settings)
    took_s = time.monotonic() - begun_s
    console.print(
        f"{name} at {speed:g} times the pace: {result.span_s:,.0f} s in {took_s:.1f} s, "
        f"decisions {result.decisions_sha256[:16]}",
        style="dim",
    )
    return Case(name, speed, result)


def _table(cases: Sequence[Case], goal: Goal) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in SHORT:
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for row in rows(cases, goal):
        named = dict(zip(HEADINGS, row, strict=True))
        table.add_row(*(named[heading] for heading in SHORT))
    return table


def _check(wish: Wish) -> None:
    known = get_args(QueuePolicy)
    problems = [
        f"policy is {policy!r}, must be one of {', '.join(known)}"
        for policy in wish.policies
        if policy not in known
    ]
    problems += [f"speed is {speed}, must be above 0" for speed in wish.speeds if not speed > 0]
    if not wish.speeds:
        problems.append("no speed is given, 1 is the trace's own")
    if wish.requests is not None and wish.requests < 1:
        problems.append(f"requests is {wish.requests}, must be at least 1")
    if wish.hosts < 1:
        problems.append(f"hosts is {wish.hosts}, must be at least 1")
    if wish.start_s is not None and not 0 <= wish.start_s < math.inf:
        problems.append(f"start_s is {wish.start_s}, must be at least 0")
    if not 0 <= wish.noise_sigma < math.inf:
        problems.append(f"noise is {wish.noise_sigma}, must be at least 0; 0.3 is a lot")
    if problems:
        raise ConfigError("; ".join(problems))


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
