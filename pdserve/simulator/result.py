"""What a simulation found: one row per request as columns, counters, and samples over time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdserve.clock import S
from pdserve.simulator.attempt import Job, Outcome

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sample:
    """The router's queue at one moment."""

    at_s: float
    waiting_by_level: tuple[int, ...]
    parked: int


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """Columns have one row per request, in order of arrival; NaN where there is no such time."""

    name: str
    arrival_s: Floats
    ttft_s: Floats
    tpot_s: Floats  # of what follows the first token
    e2e_s: Floats
    prompt_tokens: NDArray[np.int64]
    generated_tokens: NDArray[np.int64]
    cached_tokens: NDArray[np.int64]
    level: NDArray[np.int64]  # of the router's queue, at the first dispatch; -1: never dispatched
    preempted: NDArray[np.int64]
    parked: NDArray[np.int64]
    attempts: NDArray[np.int64]
    finished: NDArray[np.bool_]  # else refused, or given up
    tenants: tuple[str, ...]
    span_s: float  # until the last event
    prefill_busy: float  # part of the prefill workers' time
    counters: Mapping[str, int]
    samples: tuple[Sample, ...]
    decisions_sha256: str

    @property
    def count(self) -> int:
        return len(self.arrival_s)

    def attainment(self, *, ttft_s: float | None = None, tpot_s: float | None = None) -> float:
        """The part of all requests that were finished within both limits."""
        good = self.finished.copy()
        if ttft_s is not None:
            good &= np.nan_to_num(self.ttft_s, nan=np.inf) <= ttft_s
        if tpot_s is not None:
            good &= np.nan_to_num(self.tpot_s, nan=0.0) <= tpot_s  # one token has no gaps
        return float(good.mean())


def columns(jobs: Sequence[Job]) -> dict[str, Any]:
    """The per-request part of a ``Result``."""
    arrival_ns = _column([job.trace.arrival_ns for job in jobs])
    first_ns = _column([job.first_ns for job in jobs])
    end_ns = _column([job.end_ns for job in jobs])
    generated = _column([job.delivered for job in jobs])
    finished = np.array([job.outcome is Outcome.FINISHED for job in jobs], dtype=np.bool_)
    ttft_s = np.where(first_ns >= 0, (first_ns - arrival_ns) / S, np.nan)
    e2e_s = np.where(finished, (end_ns - arrival_ns) / S, np.nan)
    gaps = np.maximum(generated - 1, 1)
    tpot_s = np.where(finished & (generated > 1), (end_ns - first_ns) / S / gaps, np.nan)
    return {
        "arrival_s": arrival_ns / S,
        "ttft_s": ttft_s,
        "tpot_s": tpot_s,
        "e2e_s": e2e_s,
        "prompt_tokens": _column([job.trace.prompt_tokens for job in jobs]),
        "generated_tokens": generated,
        "cached_tokens": _column([job.cached_tokens for job in jobs]),
        "level": _column([job.level for job in jobs]),
        "preempted": _column([job.preempted_count for job in jobs]),
        "parked": _column([job.parked_count for job in jobs]),
        "attempts": _column([job.attempt + 1 for job in jobs]),
        "finished": finished,
        "tenants": tuple(job.trace.tenant for job in jobs),
    }


def _column(values: Sequence[int]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)
