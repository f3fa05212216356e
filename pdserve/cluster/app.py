"""The cluster as one Ray Serve application.

    serve run pdserve.cluster.app:build              with the defaults
    serve deploy deploy/serve-config.yaml            with `args:` as in our configuration
    serve.run(build({"decode": {"replicas": 2}}))    from Python

Four deployments: ``router``, ``prefill``, ``decode`` and the ingress, ``gateway``; without
``prefill`` in ``aggregated`` mode. Their replicas are the real processes, so Serve's numbers,
health checks, restarts, placement and autoscaling act on what does the work. Serve's handles carry
control only (where is the router, how many workers are wanted); requests, tokens and KV blocks go
through our own sockets and shared memory.
"""

import asyncio
import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle

from pdserve.cluster.autoscaling import METRIC, metric_of
from pdserve.cluster.collecting import collect_rarely
from pdserve.cluster.compute_threads import set_threads
from pdserve.cluster.logs import start_logging
from pdserve.cluster.router_service import RouterService
from pdserve.cluster.scaler import Scaler, plan_of
from pdserve.cluster.session import GatewaySession, Served
from pdserve.cluster.store_supervisor import ensure_store, masters_by, supervisor_of_this_host
from pdserve.cluster.terms import RayTerms
from pdserve.cluster.worker_shell import WorkerShell
from pdserve.config import ClusterConfig, PoolConfig
from pdserve.errors import ConfigError, StoreUnavailable
from pdserve.ids import HostId
from pdserve.kvstore.security import credentials_of
from pdserve.messages import Address, Role
from pdserve.router.costs import CostModel
from pdserve.router.scaling import Observation
from pdserve.router_config import RouterConfig
from pdserve.settings import from_tree, to_tree
from pdserve.wire.hosts import local_host_id

log = logging.getLogger(__name__)

MODEL_KNOWN_S = 120.0
"""How long a gateway waits for the first worker: loading a large model takes its time."""

HEALTH_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 10.0
LEAVE_S = 15.0
"""After it has drained, for a process to end."""

CALLS_MAX = 1000  # control calls at once to one replica


def build(args: Mapping[str, Any] | None = None) -> serve.Application:
    """The application, from nested plain settings as in a YAML file.

    Raises:
        ConfigError: a key is unknown or a value does not fit; nothing has been started.
    """
    config = from_tree(dict(args or {}))
    costs_of(config.router)  # what is wrong with a profile is said here, not in a replica
    tree = to_tree(config)
    common: dict[str, Any] = {
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": 0.1,
        "max_ongoing_requests": CALLS_MAX,
        "logging_config": {"enable_access_log": False},  # of control calls; clients' are ours
    }
    router = serve.deployment(
        name="router",
        num_replicas=config.router.replicas,
        ray_actor_options=_front_options(config),
        **common,
    )(Router).bind(tree)
    pools = [
        serve.deployment(name=role.value, **_pool_options(pool, config), **common)(Worker).bind(
            role.value, tree, router
        )
        for role, pool in _pools_of(config).items()
    ]
    return serve.deployment(
        name="gateway",
        num_replicas=config.gateway.replicas,
        ray_actor_options=_front_options(config),
        graceful_shutdown_timeout_s=config.drain_timeout_s + LEAVE_S,
        **{**common, "max_ongoing_requests": config.gateway.streams_max},
    )(serve.ingress()(Gateway)).bind(tree, router, *pools)


def _pools_of(config: ClusterConfig) -> dict[Role, PoolConfig]:
    """In ``aggregated`` mode the workers of one pool do everything."""
    if config.router.mode == "aggregated":
        return {Role.DECODE: config.decode}
    return {Role.PREFILL: config.prefill, Role.DECODE: config.decode}


def _pool_options(pool: PoolConfig, config: ClusterConfig) -> dict[str, Any]:
    # A replica reserves for all processes of its worker: they are its children, on its host.
    actor: dict[str, Any] = {
        "num_cpus": pool.cpus * pool.tensor_parallel,
        "resources": dict(pool.resources),
    }
    if pool.labels:
        actor["label_selector"] = dict(pool.labels)
    if pool.gpus is not None:
        actor["num_gpus"] = pool.gpus * pool.tensor_parallel
    elif config.model.device == "cuda":
        actor["num_gpus"] = pool.tensor_parallel
    options: dict[str, Any] = {
        "ray_actor_options": actor,
        "graceful_shutdown_timeout_s": config.drain_timeout_s + LEAVE_S,
    }
    if pool.replicas_most == pool.replicas:
        return {**options, "num_replicas": pool.replicas}
    scaling = config.autoscaling
    return {
        **options,
        "autoscaling_config": AutoscalingConfig(
            min_replicas=pool.replicas,
            initial_replicas=max(1, pool.replicas),  # who serves has to know the model
            max_replicas=pool.replicas_most,
            upscale_delay_s=0.0,  # delays are the autoscaler's, which can explain and simulate them
            downscale_delay_s=0.0,
            downscale_to_zero_delay_s=0.0,
            metrics_interval_s=scaling.metrics_interval_s,
            look_back_period_s=2 * scaling.metrics_interval_s,
            policy=AutoscalingPolicy(policy_function="pdserve.cluster.autoscaling:policy"),
        ),
    }


def _front_options(config: ClusterConfig) -> dict[str, Any]:
    """Of the router and the gateways, which compute next to nothing."""
    options: dict[str, Any] = {"num_cpus": 0}
    if config.gateway.labels:
        options["label_selector"] = dict(config.gateway.labels)
    return options


class Router:
    """The deployment around ``RouterService``. Questions may come to any replica: the one that
    leads answers."""

    async def __init__(self, tree: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits
        start_logging()
        self._config = from_tree(tree)
        app = serve.get_replica_context().app_name
        self._service = RouterService(
            self._config.router,
            host=local_host_id(),
            costs=costs_of(self._config.router),
            register=RayTerms(app),
            answer=self._answer,
        )
        self._scaler = Scaler(
            plan_of(self._config),
            observe=self._observed,
            wake=lambda role: serve.get_deployment_handle(role.value, app).wake.remote(),
        )
        await self._service.start(
            directory_of(self._config),
            tcp_host=tcp_host_of(self._config),
            credentials=credentials_of(self._config.store),
        )
        self._scaler.start()
        collect_rarely()

    async def address(self) -> tuple[str, str, str]:
        """Of this replica; a link that comes is told who leads."""
        return _plain(self._service.address)

    async def namespace(self) -> str:
        """Of the workers' KV blocks, in hexadecimal; empty before the first worker came."""
        return await self._service.ask("namespace")

    async def snapshot(self) -> str:
        return await self._service.ask("snapshot")

    async def recording(self) -> str:
        return await self._service.ask("recording")

    async def wants(self) -> str:
        """Replicas that each pool should have: JSON of {"prefill": 1, "decode": 2}."""
        return await self._service.ask("wants")

    async def assign(self, worker: str, role: str) -> str:
        """Give a worker another role; why not, or nothing."""
        return await self._service.ask("assign", json.dumps([worker, role]))

    async def scaling(self) -> str:
        return await self._service.ask("scaling")

    async def observations(self) -> str:
        return await self._service.ask("observations")

    def _answer(self, question: str, argument: str) -> str:
        match question:
            case "namespace":
                return self._namespace()
            case "assign":
                return self._assign(*json.loads(argument))
            case "snapshot":
                figures: Any = asdict(self._service.snapshot())
                figures |= {"router": self._service.leadership()}
            case "recording":
                figures = self._service.recording()
            case "wants":
                figures = self._scaler.wants()
            case "scaling":
                figures = self._scaler.explain()
            case "observations":
                figures = self._scaler.observations()
            case _:
                raise StoreUnavailable(f"no router answers {question!r}; are all of one version?")
        return json.dumps(figures)

    def _observed(self) -> Observation | None:
        return self._service.observation() if self._service.leads else None

    def _namespace(self) -> str:
        hello = self._service.hello
        if hello is None:
            self._scaler.asked()
        return hello.namespace if hello else ""

    def _assign(self, worker: str, role: str) -> str:
        try:
            self._service.assign(worker, role)
        except ConfigError as error:
            return str(error)
        return ""

    async def __del__(self) -> None:
        self._scaler.stop()
        await self._service.close()


class Worker:
    """The deployment of both pools; its replicas are the workers."""

    async def __init__(  # type: ignore[misc]  # Serve awaits
        self, role: str, tree: dict[str, Any], router: DeploymentHandle
    ) -> None:
        start_logging()
        config = from_tree(tree)
        pool = config.prefill if role == Role.PREFILL else config.decode
        set_threads(pool, alone=config.has_one_worker)
        if pool.nice:
            os.nice(pool.nice)
        self._router = router
        self._config = config
        host, tcp_host, directory = local_host_id(), tcp_host_of(config), directory_of(config)
        app = serve.get_replica_context().app_name
        place = place_of(ray.get_runtime_context().get_node_labels(), config.router)
        self._shell = WorkerShell(Role(role), config, host=host, place=place)

        # Now, although it is needed once the model is there: the two take seconds side by side.
        supervisor = supervisor_of_this_host(app, directory, tcp_host, config.store)
        await self._shell.start(
            directory,
            lambda block_bytes, codec: ensure_store(supervisor, block_bytes, codec),
            lambda: _find_router(router),
            find_masters=lambda: masters_by(supervisor),
            tcp_host=tcp_host,
        )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        wants: dict[str, int] = json.loads(await self._router.wants.remote())
        metrics = {metric_of(pool): float(count) for pool, count in wants.items()}
        if (own := wants.get(self._shell.role.value)) is not None:
            metrics[METRIC] = float(own)
        return metrics

    async def wake(self) -> None:
        """Returns when there is a worker to call."""

    async def check_health(self) -> None:
        self._shell.check_health()

    async def __del__(self) -> None:
        await self._shell.drain(timeout_s=self._config.drain_timeout_s)


class Gateway:
    """The ingress: our ASGI application, behind Serve's proxy and on a server of its own."""

    async def __init__(  # type: ignore[misc]  # Serve awaits
        self, tree: dict[str, Any], router: DeploymentHandle, *_pools: DeploymentHandle
    ) -> None:
        from pdserve.cluster.front import Front
        from pdserve.cluster.tracing import start_tracing

        start_logging()
        start_tracing()
        config = from_tree(tree)
        self._session = await _open_session(config, router)
        self._front = Front(
            self._session,
            config,
            snapshot=_asking(router.snapshot),
            recording=_asking(router.recording),
            assign=router.assign.remote,
            operations={
                "/cluster/autoscaling": _asking(router.scaling),
                "/cluster/autoscaling/observations": _asking(router.observations),
            },
        )
        await self._front.start()

    async def addresses(self) -> str:
        """Where this gateway listens: JSON of {"http": port, "grpc": port}."""
        return json.dumps(self._front.ports)

    async def __serve_build_asgi_app__(self) -> Any:
        return self._front.app

    async def __del__(self) -> None:
        await self._front.stop()
        await self._session.close()


async def _open_session(config: ClusterConfig, router: DeploymentHandle) -> GatewaySession:
    from pdserve.model.adapter_files import locate_adapters
    from pdserve.model.families.registry import read_architecture
    from pdserve.model.source import locate
    from pdserve.text.tokenizer import load_tokenizer

    files = await asyncio.to_thread(locate, config.model)
    architecture = await asyncio.to_thread(read_architecture, files)
    tokenizer = await asyncio.to_thread(load_tokenizer, files.path)
    adapters = await asyncio.to_thread(locate_adapters, config.model, files.name)
    served = Served(
        name=config.model.served_name or files.name,
        context_tokens=min(
            architecture.context_tokens, config.model.context_tokens or architecture.context_tokens
        ),
        namespace=bytes.fromhex(await _namespace(router)),
        block_tokens=config.model.block_tokens,
        streams_max=config.gateway.streams_max,
        adapters={adapter.name: adapter.digest for adapter in adapters},
    )
    session = GatewaySession(served, tokenizer, host=local_host_id())
    await session.start(
        directory_of(config),
        lambda: _find_router(router),
        tcp_host=tcp_host_of(config),
        silence_s=config.router.router_silence_ms / 1000,
        credentials=credentials_of(config.store),
    )
    return session


async def _namespace(router: DeploymentHandle) -> str:
    async with asyncio.timeout(MODEL_KNOWN_S):
        while True:
            with contextlib.suppress(ray.exceptions.RayError):  # no router leads at this moment
                if namespace := await router.namespace.remote():
                    return str(namespace)
            await asyncio.sleep(0.25)


def _asking(method: Any) -> Any:
    """A call of a method of the router's replica, which answers in JSON."""

    async def ask() -> dict[str, Any]:
        try:
            tree: dict[str, Any] = json.loads(await method.remote())
        except ray.exceptions.RayError as error:
            raise StoreUnavailable(f"the router's replica does not answer: {error}") from error
        return tree

    return ask


async def _find_router(router: DeploymentHandle) -> Address:
    try:
        async with asyncio.timeout(5.0):
            host, unix_path, tcp = await router.address.remote()
    except ray.exceptions.RayError as error:
        raise StoreUnavailable(f"the router's replica does not answer: {error}") from error
    return Address(HostId(host), unix_path, tcp)


def _plain(address: Address) -> tuple[str, str, str]:
    return address.host, address.unix_path, address.tcp


def costs_of(settings: RouterConfig) -> CostModel | None:
    """Of the profile that is named, if one is."""
    if settings.profile is None:
        return None
    from pdserve.cluster.profiles import load_profile

    return load_profile(settings.profile)


def sockets_directory(config: ClusterConfig) -> Path:
    """Where this host's sockets are, once there are any."""
    default = Path(tempfile.gettempdir()) / f"pdserve-{os.getuid()}"
    return Path(config.directory) if config.directory else default


def directory_of(config: ClusterConfig) -> Path:
    """The same directory, made on first use, for this user alone."""
    directory = sockets_directory(config)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise ConfigError(f"directory is {directory}, which belongs to somebody else; set another")
    return directory


def place_of(labels: Mapping[str, str], settings: RouterConfig) -> tuple[str, ...]:
    """Where a host with these Ray labels is, coarse to fine; empty where nobody asks."""
    names = filter(None, map(str.strip, settings.topology_labels.split(",")))
    return tuple(labels.get(name, "") for name in names)


def tcp_host_of(config: ClusterConfig) -> str | None:
    return ray.util.get_node_ip_address() if config.tcp else None
