"""The cluster as one Ray Serve application.

    serve run pdserve.cluster.app:build              with the defaults
    serve deploy deploy/serve-config.yaml            with `args:` as in our configuration
    serve.run(build({"decode": {"replicas": 2}}))    from Python

Four deployments: ``router``, ``prefill``, ``decode`` and the ingress, ``gateway``; without
``prefill`` in ``aggregated`` mode. Each further model has the first three of its own, under names
with a suffix (``settings.deployment_suffix``), and the gateway is everybody's. Their replicas are
the real processes, so Serve's numbers, health checks, restarts, placement and autoscaling act on
what does the work. Serve's handles carry control only (where is the router, how many workers are
wanted); requests, tokens and KV blocks go through our own sockets and shared memory.

A deployment is replaced when its own settings change, and only then: its version is their digest.
Which further models there are reaches the gateways as ``user_config``, while they run.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle

from pdserve.cluster.autoscaling import METRIC, metric_of
from pdserve.cluster.collecting import collect_rarely
from pdserve.cluster.compute_threads import set_threads
from pdserve.cluster.gateway.opening import find_router
from pdserve.cluster.logs import start_logging
from pdserve.cluster.places import directory_of, place_of, tcp_host_of
from pdserve.cluster.router_service import RouterService
from pdserve.cluster.scaler import Scaler, plan_of
from pdserve.cluster.store_supervisor import ensure_store, masters_by, supervisor_of_this_host
from pdserve.cluster.terms import RayTerms
from pdserve.cluster.version import installed_version
from pdserve.cluster.worker_shell import WorkerShell
from pdserve.config import ClusterConfig, PoolConfig
from pdserve.errors import ConfigError, StoreUnavailable
from pdserve.kvstore.security import credentials_of
from pdserve.messages import Address, Role
from pdserve.router.costs import CostModel
from pdserve.router.scaling import Observation
from pdserve.router_config import RouterConfig
from pdserve.settings import (
    deployment_suffix,
    first_model,
    from_tree,
    further_models,
    to_tree,
)
from pdserve.wire.hosts import local_host_id

log = logging.getLogger(__name__)

HEALTH_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 10.0
LEAVE_S = 15.0
"""After it has drained, for a process to end."""

CALLS_MAX = 1000  # control calls at once to one replica

_COMMON: Mapping[str, Any] = {
    "health_check_period_s": HEALTH_PERIOD_S,
    "health_check_timeout_s": HEALTH_TIMEOUT_S,
    "graceful_shutdown_wait_loop_s": 0.1,
    "max_ongoing_requests": CALLS_MAX,
    "logging_config": {"enable_access_log": False},  # of control calls; clients' are ours
}


def build(args: Mapping[str, Any] | None = None) -> serve.Application:
    """The application, from nested plain settings as in a YAML file.

    Raises:
        ConfigError: a key is unknown or a value does not fit; nothing has been started.
    """
    config = from_tree(dict(args or {}))
    first, further = first_model(config), further_models(config)
    router, *pools = _bound(first, "", list(further))
    others = [
        each
        for name, one in further.items()
        for each in _bound(one, deployment_suffix(name), list(further))
    ]
    tree = to_tree(first)
    gateway = serve.deployment(
        name="gateway",
        num_replicas=config.gateway.replicas,
        ray_actor_options=_front_options(config),
        graceful_shutdown_timeout_s=config.drain_timeout_s + LEAVE_S,
        user_config={"models": {name: to_tree(one) for name, one in further.items()}},
        **{**_COMMON, "max_ongoing_requests": config.gateway.streams_max},
    )(serve.ingress()(Gateway))
    return _versioned(gateway, tree).bind(tree, router, *pools, *others)


def _bound(config: ClusterConfig, suffix: str, further: list[str]) -> list[Any]:
    """A model's router and pools, in this order.

    Args:
        further: the models beside the first, now. No part of the version: a worker that began alone
            goes on as it is when another model comes.
    """
    check_profile(config)
    tree = to_tree(config)
    deployment = serve.deployment(
        name=f"router{suffix}",
        num_replicas=config.router.replicas,
        ray_actor_options=_front_options(config),
        **_COMMON,
    )(Router)
    router = _versioned(deployment, tree).bind(tree)
    pools = [
        _versioned(
            serve.deployment(
                name=f"{role.value}{suffix}", **_pool_options(pool, config), **_COMMON
            )(Worker),
            tree,
        ).bind(role.value, tree, router, further)
        for role, pool in _pools_of(config).items()
    ]
    return [router, *pools]


def _versioned(deployment: Any, tree: Mapping[str, Any]) -> Any:
    """``deployment``, which Serve leaves alone until ``tree`` or this package's version changes.

    Else ``serve.run`` replaces all replicas of an application, whatever has changed. Serve has the
    notion for its own use (where a file was deployed, the digest of all ``args`` is the version of
    all deployments); where it no longer takes it, everything is replaced as before.
    """
    text = json.dumps([installed_version(), tree], sort_keys=True)
    digest = hashlib.blake2s(text.encode(), digest_size=16).hexdigest()
    with contextlib.suppress(TypeError, ValueError):
        return deployment.options(version=digest, _internal=True)
    return deployment


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
        context = serve.get_replica_context()
        app, suffix = context.app_name, context.deployment.removeprefix("router")
        self._service = RouterService(
            self._config.router,
            host=local_host_id(),
            costs=costs_of(self._config.router),
            register=RayTerms(app + suffix),
            answer=self._answer,
        )
        self._scaler = Scaler(
            plan_of(self._config),
            observe=self._observed,
            wake=lambda role: serve.get_deployment_handle(role + suffix, app).wake.remote(),
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
        self, role: str, tree: dict[str, Any], router: DeploymentHandle, further: list[str]
    ) -> None:
        start_logging()
        config = replace(from_tree(tree), models={name: {} for name in further})
        pool = config.prefill if role == Role.PREFILL else config.decode
        set_threads(pool, alone=config.has_one_worker)
        if pool.nice:
            os.nice(pool.nice)
        self._router = router
        self._config = config
        host, tcp_host, directory = local_host_id(), tcp_host_of(config), directory_of(config)
        context = serve.get_replica_context()
        app, self._suffix = context.app_name, context.deployment.removeprefix(role)
        place = place_of(ray.get_runtime_context().get_node_labels(), config.router)
        self._shell = WorkerShell(Role(role), config, host=host, place=place)

        # Now, although it is needed once the model is there: the two take seconds side by side.
        supervisor = supervisor_of_this_host(app, directory, tcp_host, config.store)
        await self._shell.start(
            directory,
            lambda block_bytes, codec: ensure_store(supervisor, block_bytes, codec),
            lambda: find_router(router),
            find_masters=lambda: masters_by(supervisor),
            tcp_host=tcp_host,
        )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        wants: dict[str, int] = json.loads(await self._router.wants.remote())
        metrics = {metric_of(pool + self._suffix): float(n) for pool, n in wants.items()}
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
        from pdserve.cluster.gateway.front import Front
        from pdserve.cluster.gateway.opening import (
            FurtherModels,
            control_of,
            follow_blocks,
            open_session,
        )
        from pdserve.cluster.tracing import start_tracing

        start_logging()
        start_tracing()
        config = from_tree(tree)
        self._session = await open_session(config, router)
        self._front = Front(self._session, config, control_of(router))
        self._further = FurtherModels(self._front, serve.get_replica_context().app_name)
        await self._front.start()
        self._following = asyncio.create_task(follow_blocks(self._session, router))

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Which models there are beside the first; Serve calls it at the start and at changes."""
        await self._further.want(user_config["models"])

    async def addresses(self) -> str:
        """Where this gateway listens: JSON of {"http": port, "grpc": port}."""
        return json.dumps(self._front.ports)

    async def __serve_build_asgi_app__(self) -> Any:
        return self._front.app

    async def __del__(self) -> None:
        await self._front.stop()
        self._following.cancel()
        await self._further.close()
        await self._session.close()


def _plain(address: Address) -> tuple[str, str, str]:
    return address.host, address.unix_path, address.tcp


def check_profile(config: ClusterConfig) -> None:
    """What is wrong with a profile is said before anything starts, not in a replica.

    Raises:
        ConfigError: there is none where the configuration says, or it is not one.
    """
    from pdserve.cluster.profiles import doubt, read_profile

    if config.router.profile is None:
        return
    if said := doubt(read_profile(config.router.profile), config.model):
        log.warning("%s", said)


def costs_of(settings: RouterConfig) -> CostModel | None:
    """Of the profile that is named, if one is."""
    if settings.profile is None:
        return None
    from pdserve.cluster.profiles import load_profile

    return load_profile(settings.profile)
