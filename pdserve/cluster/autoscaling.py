"""Policies for Ray Serve's own autoscaling: how many replicas a deployment should have.

Three of them, for ``AutoscalingConfig(policy=AutoscalingPolicy(policy_function=…))``:

``policy``        follows a number that the replicas report as their metric ``want``. Our router
                  decides on both pools at once (``router.scaling``), and each worker passes on what
                  it said of its pool.
``joint_policy``  the same for a whole application (``applications[].autoscaling_policy`` in a Serve
                  file): ``want_NAME`` is the number of the deployment NAME, whoever reports it, so
                  one that has no replica can be woken by another.
``Headroom``      decides itself, by the rules of ``router.scaling``, for any deployment whose
                  replicas report how full they are (``used``, of 1) and how long the oldest request
                  has waited (``queue_age_ms``), one of the two or both. With ``requests``, how many
                  a replica has taken so far, it knows a constant load from another.

Bounds, placement and starting replicas stay with Serve. Its delays come on top of a policy's own,
so set them to 0 beside these. An example is in ``docs/autoscaling.md``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from pdserve.config import AutoscalingConfig
from pdserve.errors import ConfigError
from pdserve.messages import Role
from pdserve.router.scaling import (
    Autoscaler,
    Bounds,
    DecodeSignals,
    Observation,
    Plan,
    PrefillSignals,
)
from pdserve.settings import from_tree

METRIC = "want"
USED = "used"
QUEUE_AGE_MS = "queue_age_ms"
REQUESTS = "requests"

PARTS = 1000
"""How fine ``used`` is."""


def metric_of(deployment: str) -> str:
    """Under which name a replica of any deployment reports what another should have."""
    return f"{METRIC}_{deployment}"


def policy(context: Any) -> tuple[int, dict[str, Any]]:
    """Replicas wanted by whichever replica was told last.

    Args:
        context: ``ray.serve.config.AutoscalingContext``.
    """
    told = _latest([context], METRIC)
    return (context.target_num_replicas if told is None else round(told)), {}


def joint_policy(contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
    """The same for all deployments of an application that scale, by what any of them was told.

    Args:
        contexts: ``AutoscalingContext`` by ``DeploymentID``.
    """
    wanted = {}
    for deployment, context in contexts.items():
        told = _latest(contexts.values(), metric_of(context.deployment_name))
        wanted[deployment] = context.target_num_replicas if told is None else round(told)
    return wanted, {}


class Headroom:
    """A policy with a memory: Serve makes one, and calls it again and again."""

    def __init__(self, **settings: Any) -> None:
        """
        Args:
            settings: of ``pdserve.config.AutoscalingConfig``. ``kv_pressure_ratio`` is the part of
                a replica that is used before there are more; ``start_s`` is 0.1 unless it is given.

        Raises:
            ConfigError: a name is unknown, or a value does not fit.
        """
        tree = {"autoscaling": {"start_s": 0.1, **settings}}
        self._settings: AutoscalingConfig = from_tree(tree).autoscaling
        self._autoscaler: Autoscaler | None = None
        self._bounds: Bounds | None = None

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        bounds = Bounds(
            context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        )
        if self._autoscaler is None or bounds != self._bounds:
            if bounds.least > bounds.most:
                raise ConfigError(f"min_replicas is {bounds.least}, max_replicas is {bounds.most}")
            plan = Plan(settings=self._settings, bounds={Role.DECODE: bounds})
            self._autoscaler, self._bounds = Autoscaler(plan), bounds
        self._autoscaler.decide(_seen(context))
        wanted = self._autoscaler.wanted(Role.DECODE)
        return (context.target_num_replicas if wanted is None else wanted), {}


def _seen(context: Any) -> Observation:
    """A replica's figures as those of a worker that does everything, with ``PARTS`` blocks."""
    count = context.current_num_replicas
    age_ms = round(max(_now(context, QUEUE_AGE_MS), default=0.0))
    used = sum(_now(context, USED))
    blocks = round(PARTS * used)
    live = round(context.total_num_requests) or round(used > 0 or age_ms > 0)
    return Observation(
        at_ms=round(context.current_time * 1000),
        live=live,
        arrived=round(sum(_now(context, REQUESTS))),
        prefill=PrefillSignals(
            workers=count,
            busy=count,
            queued=age_ms > 0,
            oldest_wait_ms=age_ms,
            work_ms=age_ms * count,  # what is before the oldest kept all of them busy so long
            arrived_work_ms=0,
            shed_count=0,
        ),
        decode=DecodeSignals(
            workers=count,
            blocks=blocks,
            worker_blocks=PARTS,
            sequences=0,
            worker_sequences=1,
            parked=0,
            is_full=False,
            step_fixed_ms=0.0,
            step_shared_ms=0.0,
        ),
    )


def _now(context: Any, metric: str) -> list[float]:
    """What each replica said last."""
    series = (context.raw_metrics or {}).get(metric, {})
    return [points[-1].value for points in series.values() if points]


def _latest(contexts: Iterable[Any], metric: str) -> float | None:
    """What was said last by any replica: a mean of numbers that were wanted is wanted by nobody."""
    points = [
        series[-1]
        for context in contexts
        for series in (context.raw_metrics or {}).get(metric, {}).values()
        if series
    ]
    return max(points, key=lambda point: point.timestamp).value if points else None
