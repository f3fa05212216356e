"""What the application is made of, and when Serve has a reason to replace which part of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdserve.cluster.app import build
from pdserve.cluster.profiles import save_profile, weights_of
from pdserve.config import ModelConfig
from pdserve.router.costs import believed

B: dict[str, Any] = {"b/1": {"model": {"source": "/m/b"}}}


def deployments(application: Any) -> Iterator[Any]:
    """Everything that the application binds, its ingress first."""
    deployment = application._bound_deployment
    yield deployment
    for argument in deployment.init_args:
        if isinstance(argument, type(application)):
            yield from deployments(argument)


def versions(tree: dict[str, Any]) -> dict[str, str]:
    return {each.name: each.version for each in deployments(build(tree))}


def models_told(tree: dict[str, Any]) -> list[str]:
    gateway = next(deployments(build(tree)))
    return list(gateway.user_config["models"])


FIRST = {"gateway", "router", "prefill", "decode"}


def test_each_model_has_a_router_and_pools_and_one_gateway_serves_all() -> None:
    assert set(versions({})) == FIRST
    assert models_told({}) == []
    tree = {"models": {**B, "c": {"router": {"mode": "aggregated"}}}}
    further = {"router-b-1", "prefill-b-1", "decode-b-1", "router-c", "decode-c"}
    assert set(versions(tree)) == FIRST | further
    assert models_told(tree) == ["b/1", "c"]


@pytest.mark.parametrize(
    ("changed", "replaced"),
    [
        ({}, set()),
        ({"models": {}}, set()),
        ({"models": B | {"c": {}}}, set()),
        ({"models": {"b/1": {"decode": {"replicas": 2}}}}, {"b-1"}),
        ({"models": B, "model": {"source": "/m/a"}}, {"first"}),
        ({"models": B, "store": {"arena_bytes": 1 << 20}}, {"first", "b-1"}),
    ],
)
def test_a_part_is_replaced_when_its_own_settings_change_and_only_then(
    changed: dict[str, Any], replaced: set[str]
) -> None:
    before, after = versions({"models": B}), versions({"models": B, **changed})
    other = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    parts = {"first": FIRST, "b-1": {"router-b-1", "prefill-b-1", "decode-b-1"}}
    assert other == set().union(*(parts[each] for each in replaced)) & after.keys()


def test_a_profile_of_other_weights_is_warned_of_before_anything_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.yaml"
    save_profile(believed(1500), path, about={"weights": weights_of(ModelConfig())})
    build({"router": {"profile": str(path)}})
    assert not caplog.messages
    build({"router": {"profile": str(path)}, "model": {"quantization": "none"}})
    (message,) = caplog.messages
    assert "the workers have dtype auto, quantization none" in message
