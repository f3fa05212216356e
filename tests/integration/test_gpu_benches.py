"""``bench.engine --device cuda``, ``bench.kvstore --gpu``, ``bench.pd_gpu``: their rows, on a CPU
with a tiny model."""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder

import pytest
import torch

from bench import engine, kvstore_gpu, pd_gpu
from bench.engine_gpu import Sizes, rows
from bench.frame import ROOT, Options
from bench.random_model import LLAMA_3_8B, QWEN3_8B, TINY, Costs, random_runner
from pdserve.model.runner import Run
from tests import torch_alone

SMALL = Sizes(
    device="cpu",
    models={"tiny": TINY},
    batches=(1, 3),
    context=20,
    decode_steps=2,
    prompt=64,
    chunk=32,
    copy_bytes=1 << 12,
    matmul=16,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two OpenMP threads on a busy machine wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_row_has_its_limit_and_its_bar() -> None:
    made = {one.name: one for one in rows(SMALL, 3)}
    bars = {name: (one.reference, one.bar) for name, one in made.items()}
    assert bars == {
        "decode step, tiny, batch 1": ("device copy", "≥ 0.8×"),
        "decode step, tiny, batch 3": ("device copy", "≥ 0.8×"),
        "prefill step, tiny, 64 tokens": ("dense matmul", "≥ 0.65×"),
        "idle between decode steps, tiny, ahead": ("", "≤ 3 %"),
        "idle between decode steps, tiny, not ahead": ("", ""),
        "prefill while blocks leave, tiny, 64 tokens": ("the same, none leave", "≤ 1.05×"),
    }
    assert all(one.value is not None and one.value >= 0 for one in made.values())


def test_a_step_of_the_real_shapes_moves_and_computes_what_one_counts_by_hand() -> None:
    """16 GB of Llama-3-8B are 8.03e9 parameters, 0.53e9 of them the embedding."""
    llama, qwen = Costs(LLAMA_3_8B), Costs(QWEN3_8B)
    assert llama.decode_bytes(0, 0) == pytest.approx(2 * (8.03e9 - 0.525e9), rel=1e-3)
    assert qwen.decode_bytes(0, 0) == pytest.approx(2 * (8.19e9 - 0.622e9), rel=1e-3)
    assert llama.kv_bytes == 128 << 10
    assert llama.decode_bytes(64, 2048) - llama.decode_bytes(0, 0) == 16 << 30
    one, two = (llama.prefill_operations(tokens) for tokens in (4096, 8192))
    assert two / one == pytest.approx(2.14, abs=0.01)  # attention is a seventh, and grows faster
    assert two == pytest.approx(2 * 8192 * 6.98e9 + 2 * 8192**2 * 4096 * 32, rel=1e-3)


def test_a_seed_makes_the_same_model_again() -> None:
    a, b, other = (
        random_runner(TINY, torch.device("cpu"), block_count=2, running_max=1, seed=seed).step(
            [Run([1, 2, 3], 0, [0])]
        )
        for seed in (3, 3, 4)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, other)
    assert a.isfinite().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so() -> None:
    parser = argparse.ArgumentParser()
    engine.add_arguments(parser)
    (made,) = engine.measure(Options(True, parser.parse_args(["--device", "cuda"])))
    assert made.skipped == "needs a CUDA device"


def test_all_of_it_is_imported_where_there_is_torch_and_nothing_that_comes_with_ray() -> None:
    """The tests of the kernels too. Imports at the top of files are what
    ``tests/architecture/test_gpu_benches.py`` reads; here they run, with those inside functions."""
    from bench.kernels import MEASURES  # Triton must not be imported before its tests are collected

    ended = subprocess.run(
        [sys.executable, "-m", "tests.torch_alone"],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said
    for command in torch_alone.COMMANDS:
        assert f"usage: python -m {command[0]}" in said
    assert re.search(r"^[0-9]{3,} tests collected", ended.stdout, re.MULTILINE), said
    if not torch.cuda.is_available():
        assert said.count("needs a CUDA device") > len(MEASURES)


def test_what_is_hidden_is_not_found_and_all_else_is() -> None:
    finder = torch_alone.Without(PathFinder)
    assert finder.find_spec("gguf") is None
    assert finder.find_spec("ray.serve") is None
    assert finder.find_spec("json") is not None


def test_two_processes_hand_over_without_ray_and_change_no_token_and_no_bit() -> None:
    parser = argparse.ArgumentParser()
    pd_gpu.add_arguments(parser)
    options = Options(True, parser.parse_args(["--device", "cpu"]))
    made = {one.name: one for one in pd_gpu.measure(options)}
    assert made["answers like those of one process"].holds
    assert made["blocks changed by way of the arena"].holds
    assert made["blocks changed by way of the SSD"].holds
    exposed = made["exposed transfer, 100 tokens"]
    assert exposed.reference == "one layer of the prefill"
    assert exposed.value is not None
    assert exposed.value > 0


def test_the_store_s_rows_are_all_made_and_what_is_not_here_says_why() -> None:
    made = {one.name: one for one in kvstore_gpu.rows(kvstore_gpu.ON_CPU, 3)}
    skipped = {name: one.skipped for name, one in made.items() if one.skipped}
    assert skipped == kvstore_gpu.NOT_HERE
    for way in ("arena", "SSD"):
        assert made[f"blocks changed by way of the {way}"].holds
    for name, one in made.items():
        if name not in skipped and not name.startswith("blocks changed"):
            assert one.value is not None
            assert one.value > 0
            assert one.reference_value
