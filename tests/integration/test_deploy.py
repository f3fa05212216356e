"""The files of deploy/: each is what its reader takes, and our settings in them are settings."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pdserve.config import ClusterConfig
from pdserve.settings import from_tree

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
ROOT = DEPLOY.parent
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by Ray, of its own modules

SERVE_CONFIGS = ["serve-config.yaml", "serve-config-pools.yaml"]


def document(name: str) -> dict[str, Any]:
    tree = yaml.safe_load((DEPLOY / name).read_text())
    assert isinstance(tree, dict)
    return tree


def kubernetes_serve_config() -> dict[str, Any]:
    tree = yaml.safe_load(document("kuberay-rayservice.yaml")["spec"]["serveConfigV2"])
    assert isinstance(tree, dict)
    return tree


def settings_of(serve_config: dict[str, Any]) -> ClusterConfig:
    (application,) = serve_config["applications"]
    return from_tree(application["args"])


# ── Serve ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SERVE_CONFIGS)
def test_serve_takes_its_configuration(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema(**document(name))
    (application,) = schema.applications
    assert application.import_path == "pdserve.cluster.app:build"
    assert application.route_prefix == "/"


@pytest.mark.parametrize("name", SERVE_CONFIGS)
def test_its_arguments_are_settings_of_ours(name: str) -> None:
    config = settings_of(document(name))
    assert config.prefill.replicas >= 1
    assert config.decode.replicas >= 1


@pytest.mark.parametrize("name", SERVE_CONFIGS)
def test_serves_proxy_and_our_servers_take_different_ports(name: str) -> None:
    tree = document(name)
    gateway = settings_of(tree).gateway
    ports = [tree["http_options"]["port"], gateway.http_port, gateway.grpc_port]
    taken = [port for port in ports if port > 0]
    assert len(set(taken)) == len(taken)


def test_the_deployments_that_can_be_resized_are_the_two_pools() -> None:
    (application,) = document("serve-config.yaml")["applications"]
    config = settings_of(document("serve-config.yaml"))
    assert {item["name"]: item["num_replicas"] for item in application["deployments"]} == {
        "prefill": config.prefill.replicas,
        "decode": config.decode.replicas,
    }


# ── the cluster launcher ─────────────────────────────────────────────────────────────────────────


def test_the_cluster_launcher_takes_its_file() -> None:
    found = importlib.util.find_spec("ray.autoscaler")
    assert found is not None
    assert found.submodule_search_locations
    schema = Path(found.submodule_search_locations[0]) / "ray-schema.json"
    jsonschema.validate(document("ray-cluster.yaml"), json.loads(schema.read_text()))


def test_every_pool_has_hosts_that_offer_what_it_asks_for() -> None:
    cluster = document("ray-cluster.yaml")
    config = settings_of(document("serve-config-pools.yaml"))
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    for name, pool in (("prefill", config.prefill), ("decode", config.decode)):
        assert pool.resources == {name: 1.0}
        assert types[name]["resources"][name] >= 1
        assert types[name]["resources"]["GPU"] >= (pool.gpus or 0)
        assert types[name]["max_workers"] >= pool.replicas_most
    assert cluster["max_workers"] >= config.prefill.replicas_most + config.decode.replicas_most


def test_what_the_launcher_mounts_is_there() -> None:
    for source in document("ray-cluster.yaml")["file_mounts"].values():
        assert (DEPLOY / source).is_file()


def test_shared_memory_holds_the_arena_and_rays_own_store() -> None:
    options = document("ray-cluster.yaml")["docker"]["run_options"]
    (gibibytes,) = [int(m[1]) for o in options if (m := re.fullmatch(r"--shm-size=(\d+)g", o))]
    arena_bytes = settings_of(document("serve-config-pools.yaml")).store.arena_bytes
    assert gibibytes * 2**30 >= arena_bytes + 1_000_000_000


# ── Kubernetes ───────────────────────────────────────────────────────────────────────────────────


def test_kubernetes_serves_the_same_configuration() -> None:
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema(**kubernetes_serve_config())
    assert kubernetes_serve_config() == document("serve-config-pools.yaml")


def test_the_ray_service_has_the_fields_that_the_operator_requires() -> None:
    tree = document("kuberay-rayservice.yaml")
    assert (tree["apiVersion"], tree["kind"]) == ("ray.io/v1", "RayService")
    cluster = tree["spec"]["rayClusterConfig"]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert {"name", "image", "resources", "securityContext"} <= set(container)


def test_every_worker_group_offers_what_its_pool_asks_for() -> None:
    config = settings_of(kubernetes_serve_config())
    cluster = document("kuberay-rayservice.yaml")["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert set(groups) == {"prefill", "decode"}
    for name, pool in (("prefill", config.prefill), ("decode", config.decode)):
        # The operator passes the value through a shell: quoted JSON of JSON.
        offered = json.loads(
            groups[name]["rayStartParams"]["resources"].strip("'\"").replace("\\", "")
        )
        assert offered == pool.resources
        assert groups[name]["maxReplicas"] >= pool.replicas_most
        (container,) = groups[name]["template"]["spec"]["containers"]
        assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == pool.gpus
        (mount,) = container["volumeMounts"]
        (volume,) = groups[name]["template"]["spec"]["volumes"]
        assert mount == {"name": volume["name"], "mountPath": "/dev/shm"}
        size = int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30
        assert size >= config.store.arena_bytes + 1_000_000_000


# ── the image ────────────────────────────────────────────────────────────────────────────────────


def test_the_versions_agree() -> None:
    pinned = dict(
        line.split("==")
        for line in (DEPLOY / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    cluster = document("kuberay-rayservice.yaml")["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == pinned["ray"]


def test_every_dependency_is_pinned_within_what_the_project_allows() -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(
        line.split("==")
        for name in (DEPLOY / "constraints.txt", ROOT / "constraints-cpu.txt")
        for line in name.read_text().splitlines()
        if "==" in line
    )
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.name != "triton":  # torch says which
            assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_the_image_copies_what_is_there_and_runs_as_nobody_special() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = [
        source
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    assert copied
    assert all((ROOT / source).exists() for source in copied)
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["pdserve"]


# ── figures ──────────────────────────────────────────────────────────────────────────────────────


def test_prometheus_scrapes_the_port_that_the_gateway_serves() -> None:
    jobs = {job["job_name"]: job for job in document("prometheus.yml")["scrape_configs"]}
    (group,) = jobs["pdserve"]["static_configs"]
    assert group["targets"] == [f"localhost:{ClusterConfig().gateway.http_port}"]
