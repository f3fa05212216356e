"""Ray's dashboard for LLMs, as the Ray that is installed has it: our metrics make it light up."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pdserve.cluster.http.metrics import FrontMetrics
from pdserve.cluster.http.vllm_metrics import VllmMetrics
from tests.promql import metrics_in
from tests.unit.cluster.test_vllm_metrics import SNAPSHOT

pytestmark = pytest.mark.slow

OTHERS = ("ray_vllm_nixl_", "ray_vllm_kv_offload_", "ray_vllm_external_prefix_cache_")
"""Panels of transfers and caches that vLLM has as plugins: they stay empty, here as with vLLM
without those plugins."""


def test_every_panel_finds_its_figures() -> None:
    """Goal: no expression is empty but those of plugins. Method: labels too, since panels are
    joined by the worker's process; a new release of Ray that asks for more is noticed."""
    panels = pytest.importorskip(
        "ray.dashboard.modules.metrics.dashboards.serve_llm_dashboard_panels"
    )
    metrics = FrontMetrics(VllmMetrics("small", 1000))
    samples: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(metrics.render(SNAPSHOT).decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample.labels)
    asked: set[str] = set()
    for row in panels.serve_llm_dashboard_config.rows:
        for panel in row.panels:
            for target in panel.targets:
                expression = target.expr.format(global_filters="").replace("$interval", "1m")
                asked |= metrics_in(expression)
    ours = {name for name in asked if not name.startswith(OTHERS)}
    assert len(ours) > 15
    assert ours - samples.keys() == {"ray_vllm_request_success_total"}, "none has ended yet"
    partners = samples["ray_serve_deployment_request_counter_total"]
    known = {labels["WorkerId"] for labels in partners}
    for name in ours & samples.keys():
        assert {labels["WorkerId"] for labels in samples[name]} <= known, name
