"""The policies that Serve calls: what they make of what replicas reported."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pdserve.cluster.autoscaling import Headroom, joint_policy, policy
from pdserve.errors import ConfigError

Series = Mapping[str, tuple[tuple[float, float], ...]]


def context(
    name: str = "decode",
    *,
    metrics: Mapping[str, Series] | None = None,
    target: int = 2,
    running: int = 2,
    at_s: float = 0.0,
    most: int = 8,
) -> Any:
    """As much of an ``AutoscalingContext`` as a policy reads."""
    raw = {
        metric: {
            replica: [SimpleNamespace(timestamp=t, value=v) for t, v in points]
            for replica, points in series.items()
        }
        for metric, series in (metrics or {}).items()
    }
    return SimpleNamespace(
        deployment_name=name,
        raw_metrics=raw,
        target_num_replicas=target,
        current_num_replicas=running,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=most,
        total_num_requests=0.0,
        current_time=1e9 + at_s,
    )


def test_what_was_said_last_counts_and_not_the_mean() -> None:
    series = {"a": ((1.0, 2.0), (3.0, 5.0)), "b": ((2.0, 1.0),)}
    assert policy(context(metrics={"want": series}))[0] == 5


def test_without_a_word_the_number_stays() -> None:
    assert policy(context(target=3))[0] == 3
    assert policy(context(target=3, metrics={"want": {"a": ()}}))[0] == 3


def test_a_deployment_without_replicas_hears_of_its_number_from_another() -> None:
    said = {"want_prefill": {"a": ((1.0, 1.0),)}, "want_decode": {"a": ((1.0, 4.0),)}}
    contexts = {
        "p": context("prefill", target=0, running=0),
        "d": context("decode", metrics=said),
    }
    assert joint_policy(contexts)[0] == {"p": 1, "d": 4}


def seen(of: Headroom, used: float, *, seconds: int, at_s: float, age_ms: float = 0.0) -> int:
    """A replica that is so full, for so long."""
    count = 0
    for second in range(seconds):
        metrics = {
            "used": {"a": ((0.0, used),)},
            "queue_age_ms": {"a": ((0.0, age_ms),)},
            "requests": {"a": ((0.0, at_s + second),)},
        }
        count, _ = of(context(metrics=metrics, running=1, at_s=at_s + second))
    return count


def test_headroom_follows_how_full_replicas_are() -> None:
    headroom = Headroom(kv_pressure_ratio=0.8, upscale_delay_s=2, downscale_delay_s=10)
    assert seen(headroom, 0.5, seconds=8, at_s=0) == 1
    assert seen(headroom, 1.7, seconds=8, at_s=8) == 3
    assert seen(headroom, 0.5, seconds=8, at_s=16) == 3, "not yet for long enough"
    assert seen(headroom, 0.3, seconds=20, at_s=24) == 1


def test_headroom_follows_how_long_the_oldest_has_waited() -> None:
    headroom = Headroom(queue_age_ms=500, upscale_delay_s=2)
    assert seen(headroom, 0.0, seconds=8, at_s=0) == 1
    assert seen(headroom, 0.0, seconds=4, at_s=8, age_ms=900) == 2


def test_headroom_names_a_setting_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="queue_age_s"):
        Headroom(queue_age_s=1)
    with pytest.raises(ConfigError, match="kv_pressure_ratio"):
        Headroom(kv_pressure_ratio=2)


def test_the_documented_example_is_one_that_serve_takes() -> None:
    """Its deployment is declared as a user would; Serve checks and pickles the policy."""
    text = Path(__file__).parents[3].joinpath("docs/autoscaling.md").read_text()
    example = next(re.finditer(r"```python\n(.*?)```", text, re.DOTALL)).group(1)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(example, "docs/autoscaling.md", "exec"), names)
    scaling = names["Embedder"]._deployment_config.autoscaling_config
    made = scaling.policy.get_policy()(**scaling.policy.policy_kwargs)
    now_s = time.monotonic()
    assert made(context(at_s=now_s))[0] == 2
    replica = names["Embedder"].func_or_class()
    assert set(replica.record_autoscaling_stats()) == {"used", "queue_age_ms", "requests"}
