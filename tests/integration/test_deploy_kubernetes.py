"""What keeps pdserve up on Kubernetes: probes, drains, budgets, Redis; and what each needs."""

import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from pdserve.config import ClusterConfig
from pdserve.settings import from_tree

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KUBERNETES = ["kuberay-rayservice.yaml", "kuberay-redis.yaml", "kuberay-disruption.yaml"]
CORE_KINDS = ["kuberay-redis.yaml", "kuberay-disruption.yaml"]

# The operator's types, v1.5.1: fields that we could set, by where they stand.
FIELDS = {
    "service": {"serveConfigV2", "rayClusterConfig", "serveService", "upgradeStrategy"}
    | {"excludeHeadPodFromServeSvc", "rayClusterDeletionDelaySeconds"},
    "cluster": {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
    | {"authOptions", "autoscalerOptions", "gcsFaultToleranceOptions", "headServiceAnnotations"},
    "autoscaler": {"resources", "image", "imagePullPolicy", "env", "envFrom", "volumeMounts"}
    | {"securityContext", "idleTimeoutSeconds", "upscalingMode", "version"},
    "storage": {"redisUsername", "redisPassword", "externalStorageNamespace", "redisAddress"},
    "head": {"template", "headService", "enableIngress", "resources", "labels", "rayStartParams"}
    | {"serviceType"},
    "group": {"suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "resources"}
    | {"idleTimeoutSeconds", "labels", "rayStartParams", "template", "scaleStrategy", "numOfHosts"},
}


def documents(name: str) -> list[dict[str, Any]]:
    return [tree for tree in yaml.safe_load_all((DEPLOY / name).read_text()) if tree]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [tree for name in KUBERNETES for tree in documents(name) if tree["kind"] == kind]


def service() -> dict[str, Any]:
    (tree,) = of_kind("RayService")
    spec: dict[str, Any] = tree["spec"]
    return spec


def cluster() -> dict[str, Any]:
    spec: dict[str, Any] = service()["rayClusterConfig"]
    return spec


def settings() -> ClusterConfig:
    (application,) = yaml.safe_load(service()["serveConfigV2"])["applications"]
    return from_tree(application["args"])


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def test_every_field_is_one_of_the_operators() -> None:
    assert set(service()) <= FIELDS["service"]
    assert set(cluster()) <= FIELDS["cluster"]
    assert set(cluster()["autoscalerOptions"]) <= FIELDS["autoscaler"]
    assert set(cluster()["gcsFaultToleranceOptions"]) <= FIELDS["storage"]
    assert set(cluster()["headGroupSpec"]) <= FIELDS["head"]
    for group in cluster()["workerGroupSpecs"]:
        assert set(group) <= FIELDS["group"]


@pytest.mark.parametrize("name", KUBERNETES)
def test_objects_are_what_kubernetes_schemas_allow(name: str) -> None:
    """Strictly: an unknown field is an error. Of the operator's own kind its pod templates."""
    for tree in documents(name):
        if tree["kind"] != "RayService":
            kubernetes_validate.validate(tree, "1.37", strict=True)
            continue
        groups = [cluster()["headGroupSpec"], *cluster()["workerGroupSpecs"]]
        for group in groups:
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}}
            kubernetes_validate.validate(
                {**pod, "spec": group["template"]["spec"]}, "1.37", strict=True
            )


def test_a_pod_that_ends_has_time_to_hand_over_what_it_runs() -> None:
    """preStop, then Serve's own grace for a replica, both within Kubernetes' grace for the pod."""
    for group in cluster()["workerGroupSpecs"]:
        script, seconds = container(group)["lifecycle"]["preStop"]["exec"]["command"]
        assert (DEPLOY / script).is_file()
        assert f"COPY deploy/{script} " in (DEPLOY / "Dockerfile").read_text()
        grace_s = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert int(seconds) + settings().drain_timeout_s + 15 < grace_s


def test_the_script_that_drains_is_one_that_a_shell_reads() -> None:
    subprocess.run(["sh", "-n", str(DEPLOY / "drain-host.sh")], check=True, timeout=60)


def test_ray_has_the_command_that_the_script_uses() -> None:
    """It is hidden from Ray's help, so a release may change it."""
    from ray.scripts.scripts import cli

    options = {name: item for item in cli.commands["drain-node"].params for name in item.opts}
    script = (DEPLOY / "drain-host.sh").read_text()
    used = set(re.findall(r"--[a-z-]+", script))
    assert used
    assert used <= set(options)
    (reason,) = re.findall(r"--reason (\w+)", script)
    assert reason in options["--reason"].type.choices


def test_probes_ask_paths_that_are_there_and_need_no_key() -> None:
    from pdserve.cluster.http.access import OPEN_PATHS

    (port,) = [
        tree["http_options"]["port"] for tree in [yaml.safe_load(service()["serveConfigV2"])]
    ]
    for group in cluster()["workerGroupSpecs"]:
        ready = container(group)["readinessProbe"]["httpGet"]
        assert ready["path"] in OPEN_PATHS
        assert ready["port"] == port
        alive = " ".join(container(group)["livenessProbe"]["exec"]["command"])
        assert "/api/local_raylet_healthz" in alive
        assert "curl" in (DEPLOY / "Dockerfile").read_text()


def test_rays_agent_has_the_path_that_the_probe_asks_for() -> None:
    import ray

    routes = (Path(ray.__file__).parent / "dashboard/http_server_agent.py").read_text()
    assert '"/api/local_raylet_healthz"' in routes


def test_a_loading_model_is_no_reason_to_kill_a_pod() -> None:
    for group in cluster()["workerGroupSpecs"]:
        assert "httpGet" not in container(group)["livenessProbe"]


def test_each_pool_keeps_a_pod_when_nodes_are_drained_and_may_lose_one() -> None:
    budgets = {
        tree["spec"]["selector"]["matchLabels"]["pdserve-part"]: tree["spec"]
        for tree in of_kind("PodDisruptionBudget")
    }
    groups = {
        group["template"]["metadata"]["labels"]["pdserve-part"]: group
        for group in cluster()["workerGroupSpecs"]
    }
    assert set(budgets) == set(groups) == {"prefill", "decode"}
    for name, budget in budgets.items():
        # Kubernetes knows only this form for pods of a resource that it cannot scale itself.
        assert isinstance(budget["minAvailable"], int)
        assert "maxUnavailable" not in budget
        assert budget["minAvailable"] < groups[name]["minReplicas"]


def test_pools_are_as_large_as_their_groups() -> None:
    groups = {group["groupName"]: group for group in cluster()["workerGroupSpecs"]}
    for name, pool in (("prefill", settings().prefill), ("decode", settings().decode)):
        assert groups[name]["minReplicas"] == pool.replicas
        assert groups[name]["maxReplicas"] >= pool.replicas_most


def test_losing_the_head_loses_neither_the_cluster_nor_a_request() -> None:
    options = cluster()["gcsFaultToleranceOptions"]
    (redis,) = of_kind("StatefulSet")
    (address,) = of_kind("Service")
    (port,) = address["spec"]["ports"]
    assert options["redisAddress"] == f"{address['metadata']['name']}:{port['port']}"
    assert address["spec"]["selector"] == redis["spec"]["selector"]["matchLabels"]
    assert redis["spec"]["template"]["metadata"]["labels"] == address["spec"]["selector"]
    (server,) = redis["spec"]["template"]["spec"]["containers"]
    (variable,) = server["env"]
    assert options["redisPassword"]["valueFrom"] == variable["valueFrom"]
    assert cluster()["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster()["workerGroupSpecs"]:
        assert settings().gateway.labels.items() <= group["labels"].items()
        waits = {item["name"]: item["value"] for item in container(group)["env"]}
        assert int(waits["RAY_gcs_rpc_server_reconnect_timeout_s"]) >= 300
    assert (
        not settings().gateway.labels.items() & cluster()["headGroupSpec"].get("labels", {}).items()
    )
    assert settings().gateway.replicas >= 2


def test_no_secret_stands_in_a_file() -> None:
    for name in KUBERNETES:
        text = (DEPLOY / name).read_text()
        assert "kind: Secret" not in text
        assert not re.search(r"(?i)(password|token)\"?: *[\"']?[A-Za-z0-9+/]{12}", text)


def test_the_launchers_hosts_have_the_label_that_gateways_want() -> None:
    types = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())["available_node_types"]
    wanted = settings().gateway.labels.items()
    assert {name for name, kind in types.items() if wanted <= kind.get("labels", {}).items()} == {
        "prefill",
        "decode",
    }
