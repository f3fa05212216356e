"""How many replicas a pool should have, as a policy for Ray Serve's own autoscaling.

The router knows queues and KV pressure of both pools; ``router.scaling`` turns them into a number
per pool. Every replica reports that number as its metric ``want``, and the policy takes it: bounds,
delays and starting the replicas stay with Serve, so ``autoscaling_config`` in a Serve file acts on
the real workers.

Any Serve deployment may use it: report ``want`` from ``record_autoscaling_stats`` and name
``pdserve.cluster.autoscaling:policy`` as the policy function.
"""

from typing import Any

METRIC = "want"


def policy(context: Any) -> tuple[int, dict[str, Any]]:
    """Replicas wanted by whichever replica was told most recently to want most.

    Args:
        context: ``ray.serve.config.AutoscalingContext``.
    """
    values = list((context.aggregated_metrics or {}).get(METRIC, {}).values())
    wanted = round(max(values)) if values else context.target_num_replicas
    return wanted, {}
