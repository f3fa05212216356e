"""The KV store and a GPU's memory, beside what copies of locked memory reach in the same run.

    python -m bench.kvstore --gpu [--quick] [--json FILE]

Blocks of Llama-3-8B in bf16, random bits or random weights; nothing but torch and Triton is needed.

* *Offload* and *restore* go as a worker's mover has them go: many blocks begun together, between
  the pool and shared memory of the kind that an arena is, locked where it is mapped. *By layers*:
  one layer of every block at a time, as a push beside a step leaves.
* *Packed*: in 8 bits, as by ``store.codec``, on the device; bytes are those of the pool. How fast
  the kernels are by themselves says ``bench.kernels``.
* *Shared memory* is compared with ``cudaHostAlloc``, for pieces of the same size.
* *Decode step beside an offload*: by events on the device, against the same steps alone.
* *Prefix*: everything a request waits for, pins and checksums included, against computing it.
* *Blocks changed*: as ``bench.pd_gpu`` has it.

On a CPU, with a tiny shape, the same code runs for its tests.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from bench.decode_loop import NAMESPACE
from bench.engine_gpu import Bench, Limits
from bench.engine_gpu import Sizes as EngineSizes
from bench.frame import Options, Row, at_least, at_most, interleave, row, skipped
from bench.kvstore_node import running_node
from bench.pd_gpu import MOVED_BLOCKS, Client, carried_out, changed_rows
from bench.random_model import BLOCK_TOKENS, DTYPE, LLAMA_3_8B, TINY, random_runner
from pdserve.engine.blocks import blocks_for
from pdserve.engine.mover import Blocks, Mover
from pdserve.engine.moves import Put, Restore
from pdserve.engine.runner import wait_for
from pdserve.engine.staging import mapped_memory, new_memory
from pdserve.ids import BlockId
from pdserve.kvstore.keys import block_keys
from pdserve.model.architecture import Architecture
from pdserve.model.packed_pool import packed_pool
from pdserve.model.pool import KvPool
from pdserve.model.runner import ModelRunner, Run

ROUNDS = 10

NOT_HERE = {
    "restore by layers": "blocks are restored whole, before the prompt's first step",
    "both directions at once": "a mover carries out one move after the other",
    "restore exposed beside a prefill": "blocks are restored whole, before the prompt's first step",
    "pack with a checksum, pack in 4 bits": "a CPU takes checksums, of the slot; there are 8 bits",
}


@dataclass(frozen=True, slots=True)
class Sizes:
    device: str = "cuda"
    architecture: Architecture = LLAMA_3_8B
    blocks: int = 512  # 1 GiB
    prefix: int = 16_000
    chunk: int = 2000
    engine: EngineSizes = field(default_factory=EngineSizes)
    batch: int = 16


ON_CPU = Sizes(
    "cpu", TINY, blocks=4, prefix=64, chunk=32, batch=2,
    engine=EngineSizes("cpu", {}, (2,), 8, 2, 16, 16, 1 << 12, 8, 1),
)  # fmt: skip


def measure(options: Options) -> Iterator[Row]:
    if not torch.cuda.is_available():
        yield skipped("offload, restore, prefix, blocks changed", "", "needs a CUDA device")
        return
    yield from rows(Sizes(), options.rounds(ROUNDS))


def rows(sizes: Sizes, rounds: int) -> Iterator[Row]:
    yield from Copying(sizes).rows(rounds)
    limits = Limits(sizes.engine)
    prefix_blocks = blocks_for(sizes.prefix, BLOCK_TOKENS)
    decode_blocks = sizes.batch * sizes.engine.blocks_each
    runner = random_runner(
        sizes.architecture,
        limits.device,
        block_count=max(decode_blocks + sizes.blocks, 2 * prefix_blocks, 2 * MOVED_BLOCKS),
        running_max=sizes.batch,
    )
    yield _decode_beside(sizes, runner, limits, rounds)
    yield _prefix(sizes, runner, rounds)
    pool = runner.pool
    assert isinstance(pool, KvPool)
    yield from changed_rows(pool)
    for name, reason in NOT_HERE.items():
        yield skipped(name, "", reason)


class Copying:
    """A pool, an arena's kind of memory, and memory of the driver's own."""

    def __init__(self, sizes: Sizes) -> None:
        self._device = torch.device(sizes.device)
        self._pool = KvPool(
            sizes.architecture,
            block_count=sizes.blocks,
            block_tokens=BLOCK_TOKENS,
            dtype=DTYPE,
            device=self._device,
        )
        self._bytes = sizes.blocks * self._pool.block_bytes
        self._places = places_in(mapped_memory(new_memory(self._bytes)), self._pool, sizes.blocks)
        self._packed = packed_pool(self._pool, sizes.architecture, "int8")
        self._packed_places = [
            (block, out[: self._packed.block_bytes]) for block, out in self._places
        ]
        on_gpu = self._device.type == "cuda"
        self._host = torch.empty(self._bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._far = torch.zeros(self._bytes, dtype=torch.uint8, device=self._device)

    def rows(self, rounds: int) -> Iterator[Row]:
        pool, places = self._pool, self._places
        actions = {
            "out": lambda: offload(pool, places),
            "layers": self._offload_by_layers,
            "packed": lambda: offload(self._packed, self._packed_places),
            "back": self._restore,
            "alloc": self._offload_to_driver_s,
            "peak_out": lambda: self._host.copy_(self._far, non_blocking=True),
            "peak_in": lambda: self._far.copy_(self._host, non_blocking=True),
        }
        for action in actions.values():
            self._gb_per_s(action)
        samples = interleave(
            rounds,
            **{name: lambda do=action: self._gb_per_s(do) for name, action in actions.items()},
        )
        for name, ours, reference, against, least in (
            ("offload of whole blocks", "out", "one copy of locked memory", "peak_out", 0.90),
            ("offload by layers", "layers", "one copy of locked memory", "peak_out", 0.75),
            ("restore of whole blocks", "back", "one copy of locked memory", "peak_in", 0.90),
            ("offload to shared memory", "out", "to cudaHostAlloc", "alloc", 0.95),
            ("offload of blocks packed in int8", "packed", "of whole blocks", "out", 1.8),
        ):
            yield row(
                name,
                samples[ours],
                "GB/s",
                reference=reference,
                reference_samples=samples[against],
                bar=at_least(least, of="ratio"),
            )

    def _offload_by_layers(self) -> None:
        pool = self._pool
        size = pool.layer_bytes
        for layer in range(pool.block_bytes // size):
            pieces = [(b, out[layer * size : (layer + 1) * size]) for b, out in self._places]
            with pool.reading(pieces, range(layer, layer + 1)):
                for block, piece in pieces:
                    pool.read_layers(block, layer, layer + 1, piece)

    def _restore(self) -> None:
        with self._pool.writing():
            for block, data in self._places:
                self._pool.write_block(block, data)

    def _offload_to_driver_s(self) -> None:
        size = self._pool.block_bytes
        for start in range(0, self._bytes, size):
            piece = slice(start, start + size)
            self._host[piece].copy_(self._far[piece], non_blocking=True)

    def _gb_per_s(self, action: Callable[[], object]) -> float:
        began_s = time.perf_counter()
        action()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._bytes / (time.perf_counter() - began_s) / 1e9


def places_in(memory: memoryview, pool: KvPool, count: int) -> list[tuple[int, memoryview]]:
    """The pool's first blocks, and a place in ``memory``, which is pinned, for each."""
    pool.pin(lambda: (memory,))
    size = pool.block_bytes
    return [(block, memory[block * size : (block + 1) * size]) for block in range(count)]


def offload(pool: Blocks, places: list[tuple[int, memoryview]]) -> None:
    with pool.reading(places):
        for block, out in places:
            pool.read_block(block, out)


def _decode_beside(sizes: Sizes, runner: ModelRunner, limits: Limits, rounds: int) -> Row:
    """Of the pool's last blocks, which the steps do not use."""
    engine = Bench(sizes.engine, runner, limits)
    pool = runner.pool
    assert isinstance(pool, KvPool)
    memory = mapped_memory(new_memory(sizes.blocks * pool.block_bytes))
    first = pool.block_count - sizes.blocks
    places = [(first + block, out) for block, out in places_in(memory, pool, sizes.blocks)]

    def step_us() -> float:
        return engine.step_s(sizes.batch, sizes.engine.context) * 1e6

    def beside_us() -> float:
        with _again_and_again(lambda: offload(pool, places)):
            return step_us()

    step_us()
    samples = interleave(rounds, beside=beside_us, alone=step_us)
    pool.unpin()
    return row(
        f"decode step of {sizes.batch} beside an offload",
        samples["beside"],
        "µs",
        reference="the same alone",
        reference_samples=samples["alone"],
        bar=at_most(1.05, of="ratio"),
    )


@contextmanager
def _again_and_again(action: Callable[[], None]) -> Iterator[None]:
    begun, ended = threading.Event(), threading.Event()

    def go_on() -> None:
        while not ended.is_set():
            action()
            begun.set()

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _prefix(sizes: Sizes, runner: ModelRunner, rounds: int) -> Row:
    """Of so many tokens, from a store's memory, and computed."""
    count = blocks_for(sizes.prefix, BLOCK_TOKENS)
    first = tuple(BlockId(block) for block in range(count))
    second = tuple(BlockId(count + block) for block in range(count))
    keys = block_keys(NAMESPACE, range(1, count * BLOCK_TOKENS + 1), BLOCK_TOKENS)
    pool = runner.pool
    with running_node(slot_count=count, block_bytes=pool.block_bytes) as store:
        mover = Mover(pool, Client("bench"), store, threaded=False)

        def computed_ms() -> float:
            began_s = time.perf_counter()
            for start in range(0, sizes.prefix, sizes.chunk):
                end = min(start + sizes.chunk, sizes.prefix)
                wait_for(runner.step([Run([1] * (end - start), start, first)]))
            return (time.perf_counter() - began_s) * 1e3

        def restored_ms() -> float:
            began_s = time.perf_counter()
            moved = carried_out(mover, Restore(store, keys, 0, second))
            assert moved.count == count, f"{moved.count} of {count} blocks were restored"
            return (time.perf_counter() - began_s) * 1e3

        computed_ms()
        put = carried_out(mover, Put(store, keys, first)).count
        assert put == count, f"{put} of {count} blocks were put"
        restored_ms()
        samples = interleave(rounds, restored=restored_ms, computed=computed_ms)
        mover.close()
    return row(
        f"prefix of {sizes.prefix} tokens from the store",
        samples["restored"],
        "ms",
        reference="computed",
        reference_samples=samples["computed"],
        bar=at_most(0.1, of="ratio"),
    )
