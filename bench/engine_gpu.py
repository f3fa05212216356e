"""The engine on a GPU against what the GPU can do: memory for decode steps, matmuls for prefill.

    python -m bench.engine --device cuda [--quick] [--json FILE]

Shapes of Llama-3-8B and Qwen3-8B with random weights in bf16. Nothing but torch and Triton is
needed (the rows about idle time: what a worker's loop imports): no Ray, no model file, no network.

* *Decode*: steps of a few batches, each fed with the tokens of the one before on the device. The
  limit is reading every matrix once and each sequence's KV, at the rate of a device-to-device copy.
  The GPU is given other work first, so that what is timed was launched in time.
* *Prefill*: one prompt in one step; the limit is the rate of a dense square product.
* *Idle*: the worker's own loop, by the clock, against the same steps on the device alone; with and
  without ``step_ahead``.
* *Push*: a prompt in chunks while the blocks of the chunk before leave for host memory, as the
  mover copies them, against the same without. They leave chunk by chunk: layers do not leave
  one by one.

On a CPU, with a tiny shape, the same code runs for its tests.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from bench.frame import Options, Row, at_least, at_most, interleave, row, skipped
from bench.random_model import BLOCK_TOKENS, DTYPE, LLAMA_3_8B, QWEN3_8B, Costs, random_runner
from pdserve.engine.blocks import blocks_for
from pdserve.engine.runner import wait_for
from pdserve.model.architecture import Architecture
from pdserve.model.drawn import Drawn
from pdserve.model.runner import ModelRunner, Run

ROUNDS = 10
IDLE_PERCENT_MAX = 3.0


@dataclass(frozen=True, slots=True)
class Sizes:
    device: str = "cuda"
    models: dict[str, Architecture] = field(
        default_factory=lambda: {"Llama-3-8B": LLAMA_3_8B, "Qwen3-8B": QWEN3_8B}
    )
    batches: tuple[int, ...] = (1, 16, 64)
    context: int = 2048
    decode_steps: int = 16  # of one sample
    prompt: int = 8192
    chunk: int = 2048
    copy_bytes: int = 1 << 30  # read and written, together
    matmul: int = 8192
    matmuls_ahead: int = 60  # about 90 ms of an H100

    @property
    def blocks_each(self) -> int:
        """Of a decoded sequence, which grows while it is measured."""
        return blocks_for(self.context + self.room_tokens, BLOCK_TOKENS)

    @property
    def room_tokens(self) -> int:
        return 64 * self.decode_steps

    @property
    def block_count(self) -> int:
        prompt_blocks = blocks_for(self.prompt, BLOCK_TOKENS)
        return max(max(self.batches) * self.blocks_each, prompt_blocks)


def measure(options: Options) -> Iterator[Row]:
    if not torch.cuda.is_available():
        yield skipped("decode, prefill, idle, push", "", "needs a CUDA device")
        return
    yield from rows(Sizes(), options.rounds(ROUNDS))


def rows(sizes: Sizes, rounds: int) -> Iterator[Row]:
    limits = Limits(sizes)
    for name, architecture in sizes.models.items():
        runner = random_runner(
            architecture,
            limits.device,
            block_count=sizes.block_count,
            running_max=max(sizes.batches),
        )
        bench = Bench(sizes, runner, limits)
        yield from bench.decode(name, rounds)
        yield bench.prefill(name, rounds)
        yield from bench.idle(name, rounds)
        yield bench.push(name, rounds)
        del bench, runner  # the next model needs the memory


class Limits:
    """What the device can do, and how its time is taken."""

    def __init__(self, sizes: Sizes) -> None:
        self.device = torch.device(sizes.device)
        self._matmuls_ahead = sizes.matmuls_ahead
        self._copy_bytes = sizes.copy_bytes
        self._matmul = sizes.matmul
        self._source = torch.zeros(sizes.copy_bytes // 2, dtype=torch.uint8, device=self.device)
        self._target = torch.zeros_like(self._source)
        self._a = torch.randn(sizes.matmul, sizes.matmul, device=self.device).to(DTYPE)
        self._b = torch.randn(sizes.matmul, sizes.matmul, device=self.device).to(DTYPE)

    def copy_gb_per_s(self) -> float:
        return self._copy_bytes / self.device_s(lambda: self._target.copy_(self._source)) / 1e9

    def matmul_gflop_per_s(self) -> float:
        return 2 * self._matmul**3 / self.device_s(self._multiply) / 1e9

    def device_s(self, action: Callable[[], object]) -> float:
        """How long the device is at ``action``, all of it launched while it was busy before."""
        if self.device.type != "cuda":
            began_s = time.perf_counter()
            action()
            return time.perf_counter() - began_s
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for _ in range(self._matmuls_ahead):
            self._multiply()
        begin.record()
        action()
        end.record()
        end.synchronize()
        elapsed_ms: float = begin.elapsed_time(end)
        return elapsed_ms / 1000

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _multiply(self) -> torch.Tensor:
        return self._a @ self._b


class Bench:
    def __init__(self, sizes: Sizes, runner: ModelRunner, limits: Limits) -> None:
        self._sizes = sizes
        self._runner = runner
        self._limits = limits
        self._costs = Costs(runner.architecture)

    def decode(self, name: str, rounds: int) -> Iterator[Row]:
        sizes = self._sizes
        for batch in sizes.batches:
            step_bytes = self._costs.decode_bytes(batch, sizes.context + sizes.decode_steps // 2)

            def rate(batch: int = batch, step_bytes: int = step_bytes) -> float:
                return step_bytes / self.step_s(batch, sizes.context) / 1e9

            rate()  # compiled, recorded
            samples = interleave(rounds, ours=rate, limit=self._limits.copy_gb_per_s)
            yield row(
                f"decode step, {name}, batch {batch}",
                samples["ours"],
                "GB/s",
                reference="device copy",
                reference_samples=samples["limit"],
                bar=at_least(0.80, of="ratio"),
            )

    def step_s(self, batch: int, context: int) -> float:
        """A decode step on the device alone, of sequences with so many tokens of KV each."""
        blocks_each = self._sizes.blocks_each
        tables = [range(i * blocks_each, (i + 1) * blocks_each) for i in range(batch)]
        drawn = Drawn(self._runner.step([Run((1,), context, table) for table in tables]))
        everybody = range(batch)

        def steps() -> None:
            nonlocal drawn
            for at in range(context + 1, context + 1 + self._sizes.decode_steps):
                runs = [Run((0,), at, table) for table in tables]
                drawn = Drawn(self._runner.step(runs, drawn.of(everybody)))

        seconds = self._limits.device_s(steps) / self._sizes.decode_steps
        drawn.tokens()
        return seconds

    def prefill(self, name: str, rounds: int) -> Row:
        prompt = self._sizes.prompt
        run = Run([1] * prompt, 0, range(blocks_for(prompt, BLOCK_TOKENS)))
        operations = self._costs.prefill_operations(prompt)

        def rate() -> float:
            return operations / self._limits.device_s(lambda: self._runner.step([run])) / 1e9

        rate()
        samples = interleave(rounds, ours=rate, limit=self._limits.matmul_gflop_per_s)
        return row(
            f"prefill step, {name}, {prompt} tokens",
            samples["ours"],
            "GFLOP/s",
            reference="dense matmul",
            reference_samples=samples["limit"],
            bar=at_least(0.65, of="ratio"),
        )

    def idle(self, name: str, rounds: int) -> Iterator[Row]:
        """Both loops use the same blocks: only times matter."""
        try:
            from bench.decode_loop import LoopUnderTest
        except ModuleNotFoundError as error:  # a worker's loop needs more than torch
            yield skipped(f"idle between decode steps, {name}", "%", f"needs {error.name}")
            return
        sizes, batch = self._sizes, max(self._sizes.batches)
        for step_ahead in (True, False):
            loop = LoopUnderTest(
                self._runner,
                sequences=batch,
                prompt_tokens=sizes.context - 1,  # and the first token of the answer
                room_tokens=sizes.room_tokens,
                chunk_tokens=sizes.chunk,
                step_ahead=step_ahead,
            )
            loop.step_s(sizes.decode_steps)
            samples = []
            for _ in range(min(rounds, sizes.room_tokens // sizes.decode_steps - 2)):
                by_clock_s = loop.step_s(sizes.decode_steps)
                on_device_s = self.step_s(batch, loop.context_tokens - sizes.decode_steps)
                samples.append(100 * max(0.0, 1 - on_device_s / by_clock_s))
            yield row(
                f"idle between decode steps, {name}, {'ahead' if step_ahead else 'not ahead'}",
                samples,
                "%",
                bar=at_most(IDLE_PERCENT_MAX) if step_ahead else None,
            )

    def push(self, name: str, rounds: int) -> Row:
        pushing = _Pushing(self._runner)
        self._prefill_s(None)
        samples = interleave(
            rounds,
            ours=lambda: self._prefill_s(pushing) * 1000,
            alone=lambda: self._prefill_s(None) * 1000,
        )
        pushing.close()
        return row(
            f"prefill while blocks leave, {name}, {self._sizes.prompt} tokens",
            samples["ours"],
            "ms",
            reference="the same, none leave",
            reference_samples=samples["alone"],
            bar=at_most(1.05, of="ratio"),
        )

    def _prefill_s(self, pushing: "_Pushing | None") -> float:
        """A prompt in chunks, each looked at when it is done, as the loop does."""
        prompt, chunk = self._sizes.prompt, self._sizes.chunk
        blocks = range(blocks_for(prompt, BLOCK_TOKENS))
        self._limits.settle()
        began_s = time.perf_counter()
        for start in range(0, prompt, chunk):
            end = min(start + chunk, prompt)
            wait_for(self._runner.step([Run([1] * (end - start), start, blocks)]))
            if pushing is not None and end < prompt:
                pushing.push(blocks[start // BLOCK_TOKENS : end // BLOCK_TOKENS])
        seconds = time.perf_counter() - began_s
        if pushing is not None:
            pushing.wait()
        return seconds


class _Pushing:
    """A thread that copies blocks to host memory, as the mover does into the arena."""

    def __init__(self, runner: ModelRunner) -> None:
        self._pool = runner.pool
        self._target = memoryview(bytearray(runner.pool.block_bytes))
        self._work: queue.Queue[range | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def push(self, blocks: range) -> None:
        self._work.put(blocks)

    def wait(self) -> None:
        self._work.join()

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (blocks := self._work.get()) is not None:
            for block in blocks:
                self._pool.read_block(block, self._target)
            self._work.task_done()
