"""A cluster that comes from a Serve file, and is deployed again with other numbers in it."""

import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.cluster.local import APP, OBJECT_STORE_BYTES, LocalCluster, end
from pdserve.config import ClusterConfig
from pdserve.settings import to_tree
from tests.integration.harness import (
    TestCluster,
    end_shared,
    ray_address_of_the_run,
    wait_for,
)


@dataclass(frozen=True, slots=True)
class Deployed(TestCluster):
    """A cluster that is deployed from a Serve file, and can be deployed again."""

    __test__ = False

    put: Callable[[dict[str, Any]], None]  # hands a Serve file over

    def deploy(self, *, decode_replicas: int) -> None:
        self.put(_serve_file(self.config, decode_replicas))

    def deploy_other(self, config: ClusterConfig) -> None:
        """Another version, with one decode replica, in the place of this one."""
        config = dataclasses.replace(config, directory=self.config.directory)
        self.put(_serve_file(config, 1))


@contextlib.contextmanager
def deployed(config: ClusterConfig, *, by_command: bool = False) -> Iterator[Deployed]:
    """``config`` with one decode replica from a Serve file; ``deploy`` changes the number.

    Args:
        by_command: with `serve deploy`, on a Ray with a dashboard; else the file goes to Serve the
            way the dashboard would pass it on.
    """
    from ray import serve

    end_shared()
    directory = Path(tempfile.mkdtemp(prefix="pd-", dir="/tmp"))
    config = dataclasses.replace(config, directory=str(directory / "s"))
    try:
        put = _by_command(directory) if by_command else _by_client()
        put(_serve_file(config, 1))
        wait_for("the application to run", _app_runs, timeout_s=120)
        ports = json.loads(serve.get_app_handle(APP).addresses.remote().result(timeout_s=10))
        yield Deployed(
            LocalCluster(f"http://127.0.0.1:{ports['http']}", "", directory), config, put
        )
    finally:
        end(directory)


def _by_client() -> Callable[[dict[str, Any]], None]:
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    ray.init(address=ray_address_of_the_run(), log_to_driver=False, logging_level=logging.ERROR)
    serve.start(proxy_location="Disabled")
    client = _get_global_client()
    return lambda tree: client.deploy_apps(ServeDeploySchema(**tree))


def _by_command(directory: Path) -> Callable[[dict[str, Any]], None]:
    import ray

    os.environ["RAY_AUTH_MODE"] = "disabled"
    context = ray.init(
        include_dashboard=True,
        dashboard_port=0,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(directory / "r"),
        _node_ip_address="127.0.0.1",
    )
    command: list[str | Path] = [Path(sys.executable).with_name("serve"), "deploy"]
    file = directory / "serve.yaml"

    def put(tree: dict[str, Any]) -> None:
        file.write_text(json.dumps(tree))  # JSON is YAML
        subprocess.run(
            [*command, file, "-a", f"http://{context.dashboard_url}"],
            check=True,
            capture_output=True,
            timeout=60,
        )

    return put


def _app_runs() -> bool:
    from ray import serve

    app = serve.status().applications.get(APP)
    assert app is None or app.status != "DEPLOY_FAILED", app
    return app is not None and app.status == "RUNNING"


def _serve_file(config: ClusterConfig, decode_replicas: int) -> dict[str, Any]:
    return {
        "proxy_location": "Disabled",
        "applications": [
            {
                "name": APP,
                "route_prefix": "/",
                "import_path": "pdserve.cluster.app:build",
                "args": to_tree(config),
                "deployments": [{"name": "decode", "num_replicas": decode_replicas}],
            }
        ],
    }
