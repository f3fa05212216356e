"""Our dashboards: every expression is well formed and asks for what ``/metrics`` has. Those of vLLM
and Ray: ``test_vllm_metrics`` and ``tests/clients``."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pdserve.cluster.http.app import create_app
from pdserve.cluster.store_metrics import render
from pdserve.config import GatewayConfig
from pdserve.kvstore.phases import Phases
from tests.promql import BadExpression, metrics_in
from tests.unit.cluster.asgi import get, post
from tests.unit.cluster.fake_session import FakeSession
from tests.unit.cluster.test_store_metrics import report
from tests.unit.cluster.test_vllm_metrics import ASK, CHAT, SNAPSHOT

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
DASHBOARDS = sorted(DEPLOY.glob("grafana-*.json"))

STATE = {"oldest_wait_ms": 5, "parked": 1, "queue_lengths": [1, 0]}


@pytest.fixture(scope="module")
def samples() -> dict[str, list[dict[str, str]]]:
    """Labels by name, after one call, with one store."""
    phases = Phases()
    phases.note(("copy", "memory"), 1000)

    async def snapshot() -> dict[str, Any]:
        return SNAPSHOT | STATE

    async def stores(_: Any) -> bytes:
        return render({"s-1": report(1, phases)}, ())

    app = create_app(FakeSession(), config=GatewayConfig(), snapshot=snapshot, stores=stores)
    assert post(app, CHAT, ASK).status == 200
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(get(app, "/metrics").body.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def expressions(tree: Any) -> Iterator[str]:
    for panel in tree["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_every_figure_of_our_dashboards_is_one_that_the_gateway_has(
    file: Path, samples: dict[str, list[dict[str, str]]]
) -> None:
    tree = json.loads(file.read_text())
    asked = {name for expression in expressions(tree) for name in metrics_in(expression)}
    assert asked
    assert asked <= samples.keys()
    ids = [panel["id"] for panel in tree["panels"]]
    assert len(set(ids)) == len(ids)
    assert {panel["datasource"]["uid"] for panel in tree["panels"]} == {"${datasource}"}


@pytest.mark.parametrize(
    ("expression", "metrics"),
    [
        ("up", {"up"}),
        ('a:b{c="d", e=~"f|g",}', {"a:b"}),
        ("sum by (le) (rate(x_bucket[1m]))", {"x_bucket"}),
        ("sum(rate(x[5m])) by (a, b) / ignoring(a) group_left(c) y offset 1h", {"x", "y"}),
        ("topk(3, x) > bool 0 or -y ^ 2", {"x", "y"}),
        ("max_over_time(rate(x[2m])[24h:1m])", {"x"}),
        ('label_replace(x, "a", "$1", "b", "(.*)")', {"x"}),
    ],
)
def test_expressions_are_read(expression: str, metrics: set[str]) -> None:
    assert metrics_in(expression) == metrics


@pytest.mark.parametrize(
    "expression",
    [
        *("", "sum(x", "x{a}", 'x{a="b"', "x[5]", "rate(x[5m]", "x y", "x +", "1m", "nonsense(x)"),
        *("sum(x, y)", "topk(x)", "x{,}", "x{a='b' c='d'}", "x#", "sum by le (x)"),
    ],
)
def test_what_prometheus_refuses_is_refused(expression: str) -> None:
    with pytest.raises(BadExpression):
        metrics_in(expression)
