"""The logits of a token and the KV it leaves are the same bits, whatever computes them with what.

The yardstick is the plainest way there is: every sequence alone, one token per step. Against it
stand random schedules: steps of up to 64 runs, some whole prompts, some chunks cut anywhere, some
single tokens, and sequences that move to another pool, as bytes, in the middle.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.config import Quantization
from pdserve.model.cpu_layers import CpuLayers
from pdserve.model.cpu_ops import CpuOps
from pdserve.model.runner import ModelRunner, Run
from pdserve.model.torch_ops import TorchOps
from tests.models.small import write_small_model
from tests.unit.model.conftest import RunnerOf

BLOCK_TOKENS = 16
SHAPES: dict[str, dict[str, Any]] = {
    "head dim 16, groups of 2": {"hidden": 64, "heads": 4, "kv_heads": 2},
    # The only groups whose register blocks have every number of rows.
    "head dim 64, groups of 1": {"hidden": 128, "heads": 2, "kv_heads": 2},
    "head dim 24, groups of 3, odd sizes": {"hidden": 72, "heads": 3, "kv_heads": 1, "ffn": 100},
    "one layer of SmolLM2": {"hidden": 576, "heads": 9, "kv_heads": 3, "ffn": 1536, "layers": 1},
}
# Windows end within sequences and within tiles; one is a whole tile.
FAMILIES: dict[str, dict[str, Any]] = {
    "a window of a tile": {"family": "mistral", "config": {"sliding_window": 64}},
    "windows in the upper layer": {
        "family": "qwen2",
        "config": {"use_sliding_window": True, "sliding_window": 37, "max_window_layers": 1},
    },
    "gemma3": {"family": "gemma3", "layers": 3, "tied": True},
    "qwen3_moe": {"family": "qwen3_moe", "config": {"mlp_only_layers": [0]}},
    "mixtral": {"family": "mixtral", "config": {"sliding_window": 50}},
}


@dataclass
class Sequence:
    tokens: list[int]
    blocks: list[int]
    logits_NV: torch.Tensor
    kv: list[bytes]
    adapter: str = ""
    done: int = 0
    home: int = 0


def alone(runner: ModelRunner, tokens: list[int], blocks: list[int], adapter: str = "") -> Sequence:
    runner.pool.tensor.zero_()
    rows = [
        runner.step([Run([token], at, blocks, adapter=adapter)])[0]
        for at, token in enumerate(tokens)
    ]
    return Sequence(tokens, blocks, torch.stack(rows), kv_of(runner, blocks), adapter)


def kv_of(runner: ModelRunner, blocks: list[int]) -> list[bytes]:
    contents = [bytearray(runner.pool.block_bytes) for _ in blocks]
    for block, content in zip(blocks, contents, strict=True):
        runner.pool.read_block(block, memoryview(content))
    return [bytes(content) for content in contents]


def move(sequence: Sequence, runners: list[ModelRunner]) -> None:
    source, target = runners[sequence.home], runners[1 - sequence.home]
    for block, content in zip(sequence.blocks, kv_of(source, sequence.blocks), strict=True):
        target.pool.write_block(block, memoryview(content))
    sequence.home = 1 - sequence.home


def random_run(sequence: Sequence, chance: random.Random) -> Run:
    left = len(sequence.tokens) - sequence.done
    length = min(left, chance.choice([1, 1, 2, 5, 17, 64, left]))
    stretch = sequence.tokens[sequence.done : sequence.done + length]
    return Run(stretch, sequence.done, sequence.blocks, adapter=sequence.adapter)


def run_in_company(
    runners: list[ModelRunner], sequences: list[Sequence], chance: random.Random
) -> int:
    """All sequences to their ends in random steps, comparing every row; the steps it took."""
    steps = 0
    for runner in runners:
        runner.pool.tensor.zero_()
    while waiting := [s for s in sequences if s.done < len(s.tokens)]:
        for sequence in waiting:
            if chance.random() < 0.1:
                move(sequence, runners)
        here = [s for s in waiting if s.home == waiting[0].home]
        chosen = chance.sample(here, chance.randint(1, len(here)))
        runs = [random_run(sequence, chance) for sequence in chosen]
        logits_RV = runners[waiting[0].home].step(runs)
        for sequence, run, row_V in zip(chosen, runs, logits_RV, strict=True):
            sequence.done += len(run.tokens)
            expected_V = sequence.logits_NV[sequence.done - 1]
            assert torch.equal(row_V, expected_V), (steps, sequence.done, len(run.tokens))
        steps += 1
    return steps


def draw_sequences(
    runner: ModelRunner, chance: random.Random, count: int, longest: int
) -> list[Sequence]:
    """They take turns with the runner's adapters and the base model."""
    free = list(range(runner.pool.block_count))
    chance.shuffle(free)
    sequences = []
    for index in range(count):
        length = chance.randint(1, longest)
        blocks = [free.pop() for _ in range(-(-length // BLOCK_TOKENS))]
        tokens = [chance.randrange(runner.architecture.vocab_size) for _ in range(length)]
        adapters = ["", *runner.adapters]
        sequences.append(alone(runner, tokens, blocks, adapters[index % len(adapters)]))
    return sequences


@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        ("torch", torch.bfloat16),
        pytest.param("cpu", torch.float16, marks=pytest.mark.slow),
        pytest.param("torch", torch.float32, marks=pytest.mark.slow),
        pytest.param("torch", torch.float16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("shape", [*SHAPES, *FAMILIES])
def test_company_chunks_and_moves_change_no_bit(
    tmp_path: Path, runner_of: RunnerOf, shape: str, kernels: str, dtype: torch.dtype
) -> None:
    directory = write_small_model(tmp_path, **(SHAPES | FAMILIES)[shape])
    chance = random.Random(f"{shape} {kernels}")
    runners = [runner_of(directory, kernels=kernels, dtype=dtype, block_count=64) for _ in range(2)]
    sequences = draw_sequences(runners[0], chance, count=6, longest=150)

    steps = run_in_company(runners, sequences, chance)

    assert steps > 1
    for sequence in sequences:
        assert kv_of(runners[sequence.home], sequence.blocks) == sequence.kv


@pytest.mark.parametrize(
    ("kernels", "quantization"),
    [
        ("cpu", "int4"),
        ("cpu", "int8"),
        ("torch", "int8"),
        pytest.param("torch", "int4", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_with_quantised_weights_they_change_no_bit_either(
    tmp_path: Path, runner_of: RunnerOf, tied: bool, kernels: str, quantization: Quantization
) -> None:
    """The last matrix of a layer has no whole groups and stays bfloat16: kinds may be mixed."""
    directory = write_small_model(tmp_path, hidden=128, heads=4, kv_heads=2, ffn=100, tied=tied)
    chance = random.Random(f"{quantization} {kernels}")
    runners = [
        runner_of(
            directory,
            kernels=kernels,
            dtype=torch.bfloat16,
            block_count=64,
            quantization=quantization,
        )
        for _ in range(2)
    ]
    sequences = draw_sequences(runners[0], chance, count=6, longest=150)

    assert run_in_company(runners, sequences, chance) > 1

    for sequence in sequences:
        assert kv_of(runners[sequence.home], sequence.blocks) == sequence.kv


@pytest.mark.parametrize("quantization", ["none", "int4"])
@pytest.mark.parametrize("threads_sleep", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, "with a norm on q and k", *list(FAMILIES)[:2]])
def test_all_layers_in_one_call_give_the_bits_of_one_after_the_other(
    tmp_path: Path,
    runner_of: RunnerOf,
    shape: str,
    threads_sleep: bool,
    quantization: Quantization,
) -> None:
    sizes = SHAPES | FAMILIES | {"with a norm on q and k": {"family": "qwen3"}}
    directory = write_small_model(tmp_path, **sizes[shape])
    runners = [
        runner_of(directory, dtype=torch.bfloat16, block_count=64, quantization=quantization)
        for _ in range(2)
    ]
    for runner, stacked in zip(runners, (CpuOps.stacked, TorchOps.stacked), strict=True):
        assert isinstance(runner.ops, CpuOps)
        runner.ops.threads_sleep = threads_sleep
        runner._layers = stacked(runner.ops, runner.weights.layers, runner.architecture)
        runner.pool.tensor.zero_()
    at_once, one_by_one = runners
    if not isinstance(at_once._layers, CpuLayers):
        pytest.skip("needs a CPU that multiplies bfloat16")
    torch.set_num_threads(2)
    chance = random.Random(shape)
    for lengths in ([40, 1, 7], [1, 1, 1], [100, 1, 1]):
        starts = [0 if length > 1 else 3 for length in lengths]
        runs = [
            Run(
                [chance.randrange(512) for _ in range(length)], start, list(range(9 * i, 9 * i + 9))
            )
            for i, (length, start) in enumerate(zip(lengths, starts, strict=True))
        ]
        assert torch.equal(at_once.step(runs), one_by_one.step(runs))
        assert torch.equal(at_once.pool.tensor, one_by_one.pool.tensor)
    assert at_once.ops.calls() == one_by_one.ops.calls()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_64_gives_every_row_what_it_gets_alone(
    tmp_path: Path, runner_of: RunnerOf, dtype: torch.dtype
) -> None:
    directory = write_small_model(tmp_path, **SHAPES["one layer of SmolLM2"])
    chance = random.Random(64)
    runner = runner_of(directory, dtype=dtype, block_count=128)
    sequences = draw_sequences(runner, chance, count=64, longest=12)
    runner.pool.tensor.zero_()

    logits_RV = runner.step([Run(s.tokens, 0, s.blocks) for s in sequences])

    for sequence, row_V in zip(sequences, logits_RV, strict=True):
        assert torch.equal(row_V, sequence.logits_NV[-1])
        assert kv_of(runner, sequence.blocks) == sequence.kv


def test_a_row_that_wants_no_logits_changes_none_of_the_others(
    tmp_path: Path, runner_of: RunnerOf
) -> None:
    directory = write_small_model(tmp_path)
    runner = runner_of(directory)
    sequences = draw_sequences(runner, random.Random(1), count=3, longest=20)

    logits_RV = runner.step(
        [Run(s.tokens, 0, s.blocks, wants_logits=index != 1) for index, s in enumerate(sequences)]
    )

    assert logits_RV.shape[0] == 2
    assert torch.equal(logits_RV[0], sequences[0].logits_NV[-1])
    assert torch.equal(logits_RV[1], sequences[2].logits_NV[-1])


def test_the_block_size_changes_no_bit(tmp_path: Path, runner_of: RunnerOf) -> None:
    directory = write_small_model(tmp_path)
    tokens = [index * 7 % 512 for index in range(100)]
    runs = [Run(tokens, 0, list(range(100)))]

    by_16, by_5 = (
        runner_of(directory, block_tokens=size, block_count=100).step(runs) for size in (16, 5)
    )

    assert torch.equal(by_16, by_5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(
    tmp_path: Path, runner_of: RunnerOf, dtype: torch.dtype
) -> None:
    """Prefill and decode workers may have different numbers of them, and share blocks."""
    directory = write_small_model(tmp_path, **SHAPES["one layer of SmolLM2"])
    tokens = [index * 13 % 512 for index in range(200)]
    runner = runner_of(directory, dtype=dtype)
    by_threads = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        together_RV = runner.step([Run(tokens, 0, list(range(16))), Run([7], 0, [20])])
        alone_RV = runner.step([Run([8], 200, list(range(16)))])
        by_threads[threads] = torch.cat((together_RV, alone_RV)), kv_of(runner, list(range(21)))
    for threads in (2, 3):
        assert torch.equal(by_threads[threads][0], by_threads[1][0])
        assert by_threads[threads][1] == by_threads[1][1]


@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul"])
def test_gates_of_odd_widths_do_not_depend_on_their_company(name: str) -> None:
    """Where torch's own way through a tensor depends on its size."""
    gated, generator = getattr(TorchOps(), name), torch.Generator().manual_seed(5)
    for channels in (33, 50, 100, 144):
        for rows in (3, 64, 333, 700):
            gate_up_NF2 = 3 * torch.randn(rows, 2 * channels, generator=generator)
            together_NF = gated(gate_up_NF2)
            for row in range(0, rows, 37):
                assert torch.equal(gated(gate_up_NF2[row : row + 1])[0], together_NF[row])
