"""Builds what a worker's engine thread needs: model, pool, tokeniser, store clients, loop.

Apart from the shell because this is the only place of `cluster` that loads torch.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdserve.config import ClusterConfig
from pdserve.decode.loop import DecodeLoop
from pdserve.engine.mover import Mover
from pdserve.engine.outputs import Load, Output
from pdserve.engine.thread import EngineThread
from pdserve.ids import HostId, WorkerId
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.keys import namespace_digest
from pdserve.messages import Address, Role
from pdserve.model.load import kv_identity, load_runner
from pdserve.model.runner import ModelRunner
from pdserve.prefill.loop import PrefillLoop
from pdserve.text.tokenizer import Tokenizer, load_tokenizer

FLIP_ENV = "PDSERVE_FAULT_FLIP_BLOCK"
"""For tests of the checksum: the n-th block that a prefill worker moves has one bit flipped on its
way, for every n in this comma-separated list. Prefill workers alone: who reads it must find it."""


@dataclass(frozen=True, slots=True)
class WorkerParts:
    config: ClusterConfig
    role: Role
    runner: ModelRunner
    tokenizer: Tokenizer
    namespace: bytes

    @property
    def block_bytes(self) -> int:
        return self.runner.pool.block_bytes

    @property
    def block_count(self) -> int:
        return self.runner.pool.block_count

    def kernel_calls(self) -> dict[str, int]:
        """How often each operation ran, under the name of the path that ran it."""
        ops = self.runner.ops
        return {f"calls_{ops.name}_{name}": count for name, count in ops.calls().items()}

    def open_store(
        self, store: Address, host: HostId, worker: WorkerId, *, warm: bool = False
    ) -> StoreClient:
        settings = self.config.store
        return StoreClient(
            store,
            host=host,
            owner=worker,
            verify=settings.verify,
            shared_memory=settings.shared_memory,
            warm=warm,
            corrupt=self._corrupt(),
        )

    def _corrupt(self) -> Callable[[memoryview], None] | None:
        return _flipper(os.environ.get(FLIP_ENV, "")) if self.role is Role.PREFILL else None

    def start_engine(
        self,
        worker: WorkerId,
        store: Address,
        host: HostId,
        emit: Callable[[Sequence[Output], Load], None],
    ) -> EngineThread:
        warm = self.role is Role.PREFILL  # the first token waits for its pushes
        mover = Mover(
            self.runner.pool,
            lambda address: self.open_store(address, host, worker, warm=warm),
            store,
        )
        config = self.config
        make = PrefillLoop if self.role is Role.PREFILL else DecodeLoop
        loop = make(
            worker=worker,
            runner=self.runner,
            mover=mover,
            tokenizer=self.tokenizer,
            namespace=self.namespace,
            settings=config.prefill if self.role is Role.PREFILL else config.decode,
            store=config.store,
        )
        return EngineThread(loop, emit, name=worker)


def build_parts(config: ClusterConfig, role: Role) -> WorkerParts:
    """Loads the model for one worker. Seconds; call it off the event loop."""
    from pdserve.model.source import locate

    settings = config.prefill if role is Role.PREFILL else config.decode
    files = locate(config.model)
    runner = load_runner(
        config.model,
        block_count=settings.pool_blocks,
        pool_bytes=settings.pool_bytes,
        threads=settings.threads,
    )
    return WorkerParts(
        config=config,
        role=role,
        runner=runner,
        tokenizer=load_tokenizer(files.path),
        namespace=namespace_digest(**kv_identity(files, runner.architecture, config.model)),
    )


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
