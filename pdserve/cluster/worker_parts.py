"""Builds what a worker's engine thread needs: model, pool, tokeniser, store clients, loop.

Apart from the shell because this is the only place of `cluster` that loads torch.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pdserve.clock import Clock, monotonic
from pdserve.config import ClusterConfig, PoolConfig, StoreConfig
from pdserve.decode.draft_loading import load_draft_model
from pdserve.decode.draft_model import DraftModel
from pdserve.decode.drafting import PromptLookup
from pdserve.decode.model_speculation import ModelSpeculation
from pdserve.decode.speculation import Speculation
from pdserve.decode.streams import Streams
from pdserve.engine.blocks import blocks_for
from pdserve.engine.faults import STEP_ENV, FaultyRunner, faults_of
from pdserve.engine.leader import Followers, load_leader
from pdserve.engine.loop import EngineLoop
from pdserve.engine.mover import Blocks, Mover
from pdserve.engine.outputs import Load, Output, ToDecode
from pdserve.engine.runner import Runner, wait_for
from pdserve.engine.thread import EngineThread
from pdserve.engine.workplace import Workplace
from pdserve.ids import HostId, StoreId, WorkerId
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.codecs import PayloadCodec
from pdserve.kvstore.keys import namespace_of
from pdserve.kvstore.locations import RemotePrefixes
from pdserve.kvstore.masters.client import MasterClient
from pdserve.kvstore.security import credentials_of
from pdserve.messages import Address, Role
from pdserve.model.load import kv_identity
from pdserve.model.packed_pool import packed_pool
from pdserve.model.runner import ModelRunner, Run
from pdserve.prefill.prompts import Prompts
from pdserve.text.tokenizer import Tokenizer, load_tokenizer

FLIP_ENV = "PDSERVE_FAULT_FLIP_BLOCK"
"""For tests of the checksum: the n-th block that a prefill worker moves has one bit flipped on its
way, for every n in this comma-separated list. Prefill workers alone: who reads it must find it."""

WARMING_TOKENS = 64
"""Enough for every operation to take the path of a chunk, and bearable in Triton's interpreter."""


_CODECS = {
    "torch.float32": PayloadCodec.FLOAT32,
    "torch.bfloat16": PayloadCodec.BFLOAT16,
    "torch.float16": PayloadCodec.FLOAT16,
    "torch.int8": PayloadCodec.INT8,
    "torch.float8_e4m3fn": PayloadCodec.FP8,
}
"""By the dtype of the pool whose blocks the store gets."""

_PACKED_CODECS = {"int8": PayloadCodec.INT8_PACKED, "fp8": PayloadCodec.FP8_PACKED}
"""By ``store.codec``."""


@dataclass(frozen=True, slots=True)
class WorkerParts:
    config: ClusterConfig
    role: Role
    runner: ModelRunner
    tokenizer: Tokenizer
    namespace: bytes
    warming_calls: Mapping[str, int]
    """Of each operation, those before the first request."""

    followers: Followers = field(default_factory=Followers)
    """The further processes of a worker whose model is split."""

    draft_model: DraftModel | None = None
    """With ``speculation: draft_model``."""

    @property
    def stored_blocks(self) -> Blocks:
        """The pool as stores see it."""
        codec = self.config.store.codec
        if codec == "plain":
            return self.runner.pool
        return packed_pool(self.runner.pool, self.runner.architecture, codec)

    @property
    def block_bytes(self) -> int:
        """Of one block in a store."""
        return self.stored_blocks.block_bytes

    @property
    def codec(self) -> PayloadCodec:
        if self.config.store.codec != "plain":
            return _PACKED_CODECS[self.config.store.codec]
        return _CODECS[str(self.runner.pool.tensor.dtype)]

    @property
    def block_count(self) -> int:
        return self.runner.pool.block_count

    def kernel_calls(self) -> dict[str, int]:
        """How often each operation ran for requests, under the name of the path that ran it."""
        return {
            f"calls_{self.runner.ops.name}_{name}": count - self.warming_calls.get(name, 0)
            for name, count in self.runner.calls().items()
        }

    def open_store(
        self, store: Address, host: HostId, worker: WorkerId, *, warm: bool = False
    ) -> StoreClient:
        settings = self.config.store
        credentials = credentials_of(settings)
        return StoreClient(
            store,
            host=host,
            owner=worker,
            verify=settings.verify,
            shared_memory=settings.shared_memory,
            warm=warm,
            codec=self.codec,
            corrupt=self._corrupt(),
            ssl_context=credentials.ssl_context(server_side=False),
            token=credentials.worker_token(),
            mooncake=settings.mooncake,
        )

    def open_remote(
        self, masters: Sequence[str], own: StoreId, host: HostId, worker: WorkerId
    ) -> RemotePrefixes | None:
        """What other hosts have, as the masters know it; None where there are none."""
        if not masters or not self.config.store.offload:
            return None
        settings = self.config.store
        credentials = credentials_of(settings)

        def connect(address: Address, timeout_s: float) -> StoreClient:
            return StoreClient(
                address,
                host=host,
                owner=worker,
                verify=settings.verify,
                codec=self.codec,
                ssl_context=credentials.ssl_context(server_side=False),
                token=credentials.worker_token(),
                mooncake=settings.mooncake,
                connect_timeout_s=timeout_s,
            )

        return RemotePrefixes(
            MasterClient(masters, credentials, name=worker, host=host), connect, own=lambda: own
        )

    def _corrupt(self) -> Callable[[memoryview], None] | None:
        return _flipper(os.environ.get(FLIP_ENV, "")) if self.role is Role.PREFILL else None

    def start_engine(
        self,
        worker: WorkerId,
        store: Address,
        host: HostId,
        emit: Callable[[Sequence[Output], Load], None],
        announce: Callable[[ToDecode], None],
        remote: RemotePrefixes | None = None,
    ) -> EngineThread:
        """``emit`` is called on the engine's thread, ``announce`` and ``remote`` on the mover's."""
        warm = self.role is Role.PREFILL  # the first token waits for its pushes
        mover = Mover(
            self.stored_blocks,
            lambda address: self.open_store(address, host, worker, warm=warm),
            store,
            announce=announce,
            remote=remote,
        )
        runner: Runner = self.runner
        if faults := faults_of(os.environ.get(STEP_ENV, "")):
            runner = FaultyRunner(runner, faults)
        loop = make_loop(
            worker=worker,
            runner=runner,
            mover=mover,
            tokenizer=self.tokenizer,
            namespace=self.namespace,
            settings=_pool_settings(self.config, self.role),
            store=self.config.store,
            draft_model=self.draft_model,
        )
        if not self.config.has_one_worker:
            return EngineThread(loop, emit, name=worker)
        from pdserve.model.cpu_ops import bind_threads

        return EngineThread(loop, emit, name=worker, first=bind_threads)


def build_parts(config: ClusterConfig, role: Role) -> WorkerParts:
    """Loads the model for one worker. Seconds; call it off the event loop."""
    from pdserve.model.source import locate

    settings = _pool_settings(config, role)
    files = locate(config.model)
    runner, followers = load_leader(
        config.model,
        rank_count=settings.tensor_parallel,
        part_count=config.tensor_parts,
        block_count=settings.pool_blocks,
        pool_bytes=settings.pool_bytes,
        threads=settings.threads,
        running_max=settings.running_max,
    )
    warm_up(runner)
    identity = kv_identity(
        files,
        runner.architecture,
        config.model,
        parts=config.tensor_parts,
        store_codec=config.store.codec,
    )
    tokenizer = load_tokenizer(files.path)
    return WorkerParts(
        config=config,
        role=role,
        runner=runner,
        tokenizer=tokenizer,
        namespace=namespace_of(identity, salt=config.store.key_salt),
        warming_calls=dict(runner.calls()),
        followers=followers,
        draft_model=_draft_model(config, settings, runner, tokenizer),
    )


def _draft_model(
    config: ClusterConfig, settings: PoolConfig, runner: ModelRunner, tokenizer: Tokenizer
) -> DraftModel | None:
    if settings.speculation != "draft_model" or settings.draft_model is None:
        return None
    return load_draft_model(
        settings.draft_model,
        config.model,
        runner,
        tokenizer,
        threads=settings.threads,
        running_max=settings.running_max,
    )


def warm_up(runner: Runner) -> None:
    """A small chunk and a decode step, on the blocks that are given out first.

    What is compiled, packed or read from disk at first use is so before a request waits for it.
    """
    pool, context_tokens = runner.pool, runner.architecture.context_tokens
    room_tokens = min(pool.block_count * pool.block_tokens, context_tokens)
    chunk = min(WARMING_TOKENS, room_tokens - 1)
    blocks = range(blocks_for(chunk + 1, pool.block_tokens))
    runner.step([Run(tokens=(0,) * chunk, start=0, blocks=blocks)])
    wait_for(runner.step([Run(tokens=(0,), start=chunk, blocks=blocks)]))


def _pool_settings(config: ClusterConfig, role: Role) -> PoolConfig:
    return config.prefill if role is Role.PREFILL else config.decode


def make_loop(
    *,
    worker: WorkerId,
    runner: Runner,
    mover: Mover,
    tokenizer: Tokenizer,
    namespace: bytes,
    settings: PoolConfig,
    store: StoreConfig,
    clock: Clock = monotonic,
    draft_model: DraftModel | None = None,
) -> EngineLoop:
    """A loop that computes prompts and decodes, wired up. ``draft_model``: as ``settings`` say."""
    workplace = Workplace(
        worker=worker,
        runner=runner,
        mover=mover,
        tokenizer=tokenizer,
        namespace=namespace,
        store=store,
    )
    streams = Streams(workplace, _speculation(settings, draft_model))
    prompts = Prompts(workplace, keep=streams.keep)
    return EngineLoop(workplace, runner, settings, prompts=prompts, streams=streams, clock=clock)


def _speculation(settings: PoolConfig, draft_model: DraftModel | None) -> Speculation | None:
    match settings.speculation:
        case "off":
            return None
        case "prompt_lookup":
            return Speculation(PromptLookup, settings.draft_tokens_max)
        case "draft_model":
            assert draft_model is not None, "loaded beside the model"
            return ModelSpeculation(draft_model, settings.draft_tokens_max)


def _flipper(which: str) -> Callable[[memoryview], None] | None:
    if not which:
        return None
    blocks = {int(text) for text in which.split(",")}
    count = 0

    def flip(data: memoryview) -> None:
        nonlocal count
        count += 1
        if count in blocks:
            data[-1] ^= 0x40  # of the last value's exponent: seen in every answer

    return flip
