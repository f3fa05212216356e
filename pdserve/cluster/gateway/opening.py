"""What a gateway does to serve a model, and those that come and go while it runs.

    settings of a model ──► its files, its router's handle ──► session ──► front

Everything of a model hangs on its router: where it listens, what its workers' blocks are called,
what the control questions say. The gateway finds it by the name of its deployment. A further model
that does not come up, or is gone, is that model's trouble alone: it is tried again, and the gateway
serves the others.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from pdserve.cluster.gateway.models import Control
from pdserve.cluster.gateway.session import GatewaySession, Served
from pdserve.cluster.places import directory_of, tcp_host_of
from pdserve.config import ClusterConfig
from pdserve.errors import ConfigError, StoreUnavailable
from pdserve.ids import HostId
from pdserve.kvstore.security import credentials_of
from pdserve.messages import Address
from pdserve.settings import deployment_suffix, from_tree
from pdserve.wire.hosts import local_host_id

if TYPE_CHECKING:
    from pdserve.cluster.gateway.front import Front

log = logging.getLogger(__name__)

MODEL_KNOWN_S = 120.0
"""How long a gateway waits for the first worker: loading a large model takes its time."""

AGAIN_S = 5.0
"""Before a further model that did not come up is tried again."""

IDLE_CHECK_S = 0.1


async def open_session(config: ClusterConfig, router: DeploymentHandle) -> GatewaySession:
    """
    Raises:
        ConfigError: the model's files cannot be found or read.
        TimeoutError: no worker has come that serves it.
    """
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
    try:
        await session.start(
            directory_of(config),
            lambda: find_router(router),
            tcp_host=tcp_host_of(config),
            silence_s=config.router.router_silence_ms / 1000,
            credentials=credentials_of(config.store),
        )
    except BaseException:
        await session.close()
        raise
    return session


async def _namespace(router: DeploymentHandle) -> str:
    """Of the blocks of the router's workers, in hexadecimal, as soon as one of them has come."""
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


async def find_router(router: DeploymentHandle) -> Address:
    try:
        async with asyncio.timeout(5.0):
            host, unix_path, tcp = await router.address.remote()
    except ray.exceptions.RayError as error:
        raise StoreUnavailable(f"the router's replica does not answer: {error}") from error
    return Address(HostId(host), unix_path, tcp)


def control_of(router: DeploymentHandle) -> Control:
    return Control(
        snapshot=_asking(router.snapshot),
        recording=_asking(router.recording),
        operations={
            "/cluster/autoscaling": _asking(router.scaling),
            "/cluster/autoscaling/observations": _asking(router.observations),
        },
        assign=router.assign.remote,
    )


@dataclass(slots=True)
class _Further:
    """A model beside the first, from when it is wanted until nothing of it runs."""

    config: ClusterConfig
    known: asyncio.Event = field(default_factory=asyncio.Event)  # it is served, or failed once
    session: GatewaySession | None = None
    task: "asyncio.Task[None] | None" = None


class FurtherModels:
    """The models of one gateway beside the first; ``want`` says which there are to be."""

    def __init__(self, front: "Front", app: str) -> None:
        """``app``: in which the models' routers are."""
        self._front = front
        self._app = app
        self._models: dict[str, _Further] = {}
        self._leaving: dict[asyncio.Task[None], GatewaySession] = {}

    async def want(self, trees: Mapping[str, Any]) -> None:
        """Serves these, by name, and no others. Those that stay as they are notice nothing.

        Returns when every new one is served or has failed once; it is then tried again.
        """
        wanted = {name: from_tree(tree) for name, tree in trees.items()}
        for name in [n for n, each in self._models.items() if wanted.get(n) != each.config]:
            self._remove(name)
        new = {name: config for name, config in wanted.items() if name not in self._models}
        for name, config in new.items():
            further = self._models[name] = _Further(config)
            further.task = asyncio.create_task(self._serve(name, further))
        await asyncio.gather(*(self._models[name].known.wait() for name in new))

    async def close(self) -> None:
        models, leaving = list(self._models.values()), list(self._leaving.values())
        self._models.clear()
        tasks = [*self._leaving, *(each.task for each in models if each.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for session in [*leaving, *(each.session for each in models)]:
            if session is not None:
                await session.close()

    async def _serve(self, name: str, further: _Further) -> None:
        router = serve.get_deployment_handle(f"router{deployment_suffix(name)}", self._app)
        while True:
            try:
                session = await open_session(further.config, router)
            except Exception as error:  # of files, Ray and Serve, which have no base in common
                log.warning("model %s is not served: %s", name, error or type(error).__name__)
                further.known.set()
                await asyncio.sleep(AGAIN_S)
                continue
            self._retire(name, further)
            try:
                self._front.add_model(session, further.config.gateway, control_of(router))
            except ConfigError as error:  # no other attempt would go better
                log.warning("model %s is not served: %s", name, error)
                await session.close()
                further.known.set()
                return
            log.info("model %s is served", name)
            further.session = session
            further.known.set()
            await _another_version(session, router)
            log.info("another version of model %s takes over", name)

    def _remove(self, name: str) -> None:
        """Whoever asks for it is refused from now on."""
        further = self._models.pop(name)
        assert further.task is not None
        further.task.cancel()
        further.known.set()  # whoever waits for it need not
        self._retire(name, further)

    def _retire(self, name: str, further: _Further) -> None:
        """Takes its session out of service, if it has one; what runs there has as long as its
        workers give it."""
        session, further.session = further.session, None
        if session is None:
            return
        self._front.remove_model(name)
        leaving = asyncio.create_task(_close_when_idle(session, further.config.drain_timeout_s))
        self._leaving[leaving] = session
        leaving.add_done_callback(self._leaving.pop)
        log.info("model %s is served no more", name)


async def _another_version(session: GatewaySession, router: DeploymentHandle) -> None:
    """Returns when the workers have other blocks than ``session`` knows: its model was deployed
    with other settings, and its router was asked while the former workers were still there."""
    while True:
        await asyncio.sleep(AGAIN_S)
        try:
            if await _namespace(router) != session.identity:
                return
        except Exception as error:  # Ray's and Serve's: the model is away, and may come back
            log.debug("a router is not there: %r", error)


async def follow_blocks(session: GatewaySession, router: DeploymentHandle) -> None:
    """For the first model, whose gateways are replaced with it: their settings are the right ones,
    and only what the former workers' blocks are called may have been told to them. A worker takes
    no key that is not its own, so until then prompts are computed whole, where they need not."""
    while True:
        await _another_version(session, router)
        session.know_blocks_as(await _namespace(router))
        log.info("the blocks of %s are another version's", session.model_name)


async def _close_when_idle(session: GatewaySession, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while session.in_flight:
                await asyncio.sleep(IDLE_CHECK_S)
    except TimeoutError:
        log.warning("%d requests of a model that left are cut off", session.in_flight)
    await session.close()
