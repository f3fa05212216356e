"""A whole cluster on this machine, started and ended by one process.

Everything that it leaves on disk lies in one private directory, so that ending it is: stop the
application, stop Ray, remove the directory.
"""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pdserve.cluster.own_ray import start_ray
from pdserve.config import ClusterConfig, MiB
from pdserve.errors import ConfigError
from pdserve.settings import to_tree

APP = "pdserve"
OBJECT_STORE_BYTES = 80 * MiB
"""Ray's own shared memory. No request, token or block goes through it."""

REMOVE_S_MAX = 5.0
SERVE_END_S_MAX = 60.0
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class LocalCluster:
    http: str  # base URL
    grpc: str  # "host:port", or "" without gRPC
    directory: Path


def interrupt_once() -> None:
    """Makes the first SIGINT or SIGTERM a KeyboardInterrupt, and lets no further one disturb the
    cleaning up that follows. Also where a shell had them ignored."""

    def interrupt(*_: object) -> None:
        for number in ENDING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in ENDING_SIGNALS:
        signal.signal(number, interrupt)


@contextlib.contextmanager
def local_cluster(
    config: ClusterConfig,
    *,
    progress: Callable[[str], None] = lambda _: None,
    ray_address: str | None = None,
) -> Iterator[LocalCluster]:
    """Starts Ray (or joins the cluster at ``ray_address``) and the application; ends both.

    Raises:
        ConfigError: Ray or the application does not start; the message carries the worker's own
            words.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled" if ray_address is None else "token")
    # Ray tells its driver of every worker that dies; here that is supervision's daily work.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
    # Serve's controller looks at everything ten times a second; on a laptop it shares the cores.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    import ray
    from ray import serve

    own_directory = Path(tempfile.mkdtemp(prefix="pdserve-", dir=_short_temp()))
    if config.directory is None:
        config = replace(config, directory=str(own_directory / "s"))
    try:
        progress("starting Ray")
        handlers = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
        if ray_address is None:
            start_ray(own_directory, OBJECT_STORE_BYTES, progress=progress)
        else:
            ray.init(address=ray_address, log_to_driver=False, logging_level=logging.ERROR)
        _restore(handlers)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        logging.getLogger("ray").setLevel(logging.ERROR)
        progress("starting Serve")
        serve.start(proxy_location="Disabled")
        progress("starting the pools and loading the model")
        yield _run(config, own_directory)
    finally:
        progress("stopping")
        end(own_directory)


def _restore(handlers: Mapping[signal.Signals, object]) -> None:
    """Ray takes SIGTERM for itself; who had it before us is to have it again."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)


def application_started(config: ClusterConfig) -> dict[str, int]:
    """Runs the application on the Ray of this process, or changes it to ``config`` where it runs.

    Returns:
        the ports of a gateway, by protocol.

    Raises:
        ConfigError: it does not start; the message carries the worker's own words.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from pdserve.cluster.app import build

    try:
        serve.run(build(to_tree(config)), name=APP, route_prefix="/")
    except (RuntimeError, RayServeException) as error:
        raise ConfigError(f"the cluster did not start: {_reason(error)}") from error
    text = serve.get_app_handle(APP).addresses.remote().result(timeout_s=10)
    ports: dict[str, int] = json.loads(text)
    return ports


def _run(config: ClusterConfig, directory: Path) -> LocalCluster:
    ports = application_started(config)
    host = config.gateway.host
    scheme = "http" if config.gateway.tls_certificate is None else "https"
    return LocalCluster(
        http=f"{scheme}://{host}:{ports['http']}" if "http" in ports else "",
        grpc=f"{host}:{ports['grpc']}" if "grpc" in ports else "",
        directory=directory,
    )


def _reason(error: Exception) -> str:
    from ray import serve

    with contextlib.suppress(Exception):  # Serve may be the thing that is broken
        app = serve.status().applications[APP]
        messages = [d.message for d in app.deployments.values() if d.message]
        if messages:
            return "\n".join(messages)
    return str(error)


def end(directory: Path) -> None:
    """Ends the application, its stores and Ray, and removes ``directory``. What is gone is gone."""
    import ray

    from pdserve.cluster.store_supervisor import stop_stores

    if ray.is_initialized():
        with contextlib.suppress(Exception):  # whatever is broken, the next steps still clean up
            _end_serve()
        with contextlib.suppress(Exception):
            asyncio.run(stop_stores(APP))
        ray.shutdown()
    # Ray's last processes may still write a line while their directory goes.
    deadline = time.monotonic() + REMOVE_S_MAX
    while directory.exists() and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)


def _end_serve() -> None:
    """Asks Serve's controller to end until nobody finds it by name any more.

    One call is not enough: on a busy machine ``serve.shutdown`` gives up without a word when the
    controller does not answer within 5 s, and a process goes on finding a dead actor by its name
    until it is told of the death. Who starts Serve on the same Ray in between is given the one
    that is about to end.
    """
    import ray
    from ray import serve

    # The application first, all of it at once. A shutdown begins with the gateways, which finish
    # what they have while a router leads, then come the workers, whose parked work waits for takers
    # as long, and only then the routers. Serve's call waits for its controller without a bound.
    deleting = threading.Thread(target=_delete_app, daemon=True)
    deleting.start()
    deleting.join(SERVE_END_S_MAX)
    deadline = time.monotonic() + SERVE_END_S_MAX
    while time.monotonic() < deadline:
        try:
            ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        except ValueError:
            return
        with contextlib.suppress(Exception):  # the next look tells
            serve.shutdown()
        time.sleep(0.02)


def _delete_app() -> None:
    from ray import serve

    with contextlib.suppress(Exception):  # the shutdown that follows ends it too
        serve.delete(APP)


def _short_temp() -> str:
    """Ray puts sockets deep below its directory, and a socket's path has at most 107 bytes."""
    default = tempfile.gettempdir()
    return default if len(default) <= 20 else "/tmp"
