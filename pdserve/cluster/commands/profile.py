"""``pdserve profile``: measure this machine with one model, fit a cost model, write it down."""

import datetime
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pdserve.cluster.commands.bars import spinner
from pdserve.cluster.commands.contention import contention
from pdserve.cluster.commands.profiling import Bench, Measured, Taken, measure
from pdserve.cluster.compute_threads import set_threads
from pdserve.cluster.profiles import save_profile, weights_of
from pdserve.config import ClusterConfig
from pdserve.router.costs import CostModel, believed
from pdserve.router.fitting import (
    Errors,
    Fit,
    decode_errors,
    fit_decode,
    fit_move,
    fit_prefill,
    prefill_errors,
)

PERCENT_DIGITS = 2
CONTENTION_DIGITS = 3

DOUBTFUL_PERCENT = 15.0
"""A model that misses points it has not seen by more was mostly measured beside other work."""


def profile(config: ClusterConfig, *, out: Path | None = None, neighbours: int = 0) -> Path:
    """Measures for at most two minutes, says what it does, and writes the profile.

    Args:
        out: None takes a name after the model, in the current directory.
        neighbours: also measure how much so many other workers on this machine slow this one down.

    Returns:
        where the profile is.

    Raises:
        ConfigError: no such model, or too little could be measured to fit it.
    """
    # As workers are started: threads that wait by sleeping take other paths.
    pool = config.decode if config.router.mode == "aggregated" else config.prefill
    threads = set_threads(pool, alone=config.has_one_worker)
    from pdserve.engine.leader import load_leader
    from pdserve.model.source import locate
    from pdserve.prefill.batch import double_cost_tokens

    console = Console(highlight=False)
    begun_s = time.monotonic()

    def say(what: str) -> None:
        console.print(f"[dim]{time.monotonic() - begun_s:5.1f} s[/]  {what} …")

    files = locate(config.model)
    say(f"loading {files.name}; measuring takes up to two minutes, keep the machine idle")
    runner, followers = load_leader(
        config.model,
        rank_count=pool.tensor_parallel,
        part_count=config.tensor_parts,
        block_count=config.decode.pool_blocks,
        pool_bytes=config.decode.pool_bytes,
        threads=pool.threads,
    )
    bench = Bench(
        runner, chunk_tokens=config.prefill.chunk_tokens, running_max=config.decode.running_max
    )
    try:
        with spinner("measuring", console):
            measured = measure(bench, say, alone=config.has_one_worker)
            slowdown = contention(bench, config, neighbours, say) if neighbours else None
    finally:
        followers.close()
    block_tokens = runner.pool.block_tokens
    costs, about = fitted(files.name, measured, runner.pool.block_bytes // block_tokens)
    path = out or Path(f"{files.name}.profile.yaml")
    about = (
        _where(threads, runner.ops.name)
        | {
            "weights": weights_of(config.model),
            "chunk_tokens": config.prefill.chunk_tokens,
            "double_cost_tokens": double_cost_tokens(
                runner.architecture.attention_like_linear_tokens
            ),
            "running_max": config.decode.running_max,
            "kv_capacity_tokens": bench.room.pool_tokens,
        }
        | about
    )
    if slowdown is not None:
        about |= {"neighbours": neighbours, "contention": round(slowdown, CONTENTION_DIGITS)}
    save_profile(costs, path, about=about)
    console.print(_table(costs, about))
    if slowdown is not None:
        console.print(f"beside {neighbours} at work everything takes {slowdown:.2f} times as long")
    if bad := doubtful(about):
        console.print(
            f"[bold]Doubtful:[/] {', '.join(bad)} misses points it has not seen by more than "
            f"{DOUBTFUL_PERCENT:g} %. Load average {os.getloadavg()[0]:.1f} on {threads} threads; "
            "measure again on an idle machine."
        )
    console.print(f"written to {path}; use it with --set router.profile={path}")
    return path


def fitted(name: str, measured: Measured, kv_token_bytes: int) -> tuple[CostModel, dict[str, Any]]:
    """The cost model of what was measured, and what to say about its errors. Pure.

    Raises:
        ConfigError: too few points, or such as leave a term open.
    """
    prefill = fit_prefill(measured.prefill.points)
    decode = fit_decode(measured.decode.points)
    host, handoff = fit_move(measured.host.points), fit_move(measured.handoff.points)
    costs = CostModel(
        name=name,
        origin="measured",
        prefill=prefill.cost,
        decode=decode.cost,
        handoff=handoff.cost,
        host=host.cost,
        ssd=believed(1).ssd,
        kv_token_bytes=kv_token_bytes,
    )
    about = {
        "errors_percent": {
            "prefill": _said(prefill, measured.prefill)
            | _held_out(measured.held_out_prefill, prefill.cost, prefill_errors),
            "decode": _said(decode, measured.decode)
            | _held_out(measured.held_out_decode, decode.cost, decode_errors),
            "host": _said(host, measured.host),
            "handoff": _said(handoff, measured.handoff),
        },
        "handoff": "over this host's loopback: between hosts, as fast as their network at best",
        "ssd": "not measured",
    }
    return costs, about


def doubtful(about: dict[str, Any]) -> list[str]:
    """Which of the models predict badly what they were not fitted to."""
    return [
        name
        for name, errors in about["errors_percent"].items()
        if errors.get("held_out_mean", errors["left_out_mean"]) > DOUBTFUL_PERCENT
    ]


def _said(fit: Fit[Any], taken: Taken[Any]) -> dict[str, float]:
    return {
        "points": fit.errors.point_count,
        "points_without_time": taken.left_out,
        "mean": _percent(fit.errors.mean),
        "p99": _percent(fit.errors.p99),
        "left_out_mean": _percent(fit.left_out.mean),
    }


def _held_out(
    taken: Taken[Any], cost: Any, errors_of: Callable[[Any, Any], Errors]
) -> dict[str, float]:
    if not taken.points:
        return {}
    errors = errors_of(cost, taken.points)
    return {"held_out_mean": _percent(errors.mean), "held_out_p99": _percent(errors.p99)}


def _percent(ratio: float) -> float:
    return round(100 * ratio, PERCENT_DIGITS)


def _where(threads: int, kernels: str) -> dict[str, Any]:
    from pdserve.model.machine import machine

    found = machine()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": found.gpu or _processor(),
        "threads": threads,
        "kernels": kernels,
        "system": f"{platform.system()} {platform.release()}",
        "pdserve": version("pdserve"),
        "python": platform.python_version(),
        "torch": str(found.torch),  # torch's own kind of text, which YAML would not write
    }


def _processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def _table(costs: CostModel, about: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("", "model", "points", "error, mean", "p99", "held out"):
        table.add_column(column)
    for name, errors in about["errors_percent"].items():
        held_out = errors.get("held_out_mean", errors["left_out_mean"])
        table.add_row(
            name,
            _formula(name, costs),
            str(errors["points"]),
            f"{errors['mean']:.1f} %",
            f"{errors['p99']:.1f} %",
            f"{held_out:.1f} %",
        )
    return table


def _formula(name: str, costs: CostModel) -> str:
    if name == "prefill":
        prefill = costs.prefill
        return (
            f"{prefill.fixed_s * 1e3:.3g} ms + {prefill.token_s * 1e3:.3g} ms per token + "
            f"{prefill.pair_s * 1e9:.3g} ns per pair"
        )
    if name == "decode":
        step = costs.decode.small
        return (
            f"{step.fixed_s * 1e3:.3g} ms + {step.sequence_s * 1e3:.3g} ms per sequence + "
            f"{step.context_s * 1e6:.3g} µs per token of context"
        )
    move = costs.host if name == "host" else costs.handoff
    return f"{move.fixed_s * 1e3:.3g} ms + bytes at {move.bytes_per_s / 1e9:.3g} GB/s"
