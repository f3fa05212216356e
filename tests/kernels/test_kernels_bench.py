"""The benchmark's own calls, on sizes that the interpreter can do."""

import argparse
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bench import kernels
from bench.frame import Options
from bench.kernels import MEASURES, Measure, Sizes, Work, measure
from tests.kernels.support import DEVICE

SMALL = Sizes(
    device=DEVICE,
    tokens=5,
    sequences=2,
    streams=2,
    context=20,
    long_context=40,
    hidden=64,
    ffn=24,
    vocabulary=60,
    heads=4,
    kv_heads=2,
    head_dim=16,
    short_head_dim=32,
    long_prompt=20,
    moved_blocks=2,
    copy_bytes=64,
    matmul=8,
)

LACKING = 1.0
OURS = Work(lambda: None, 4.0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_and_its_limit_can_be_called(name: str) -> None:
    made = MEASURES[name]
    for work in (made.work_of(SMALL), made.limit_of(SMALL)):
        assert work.amount > 0
        assert torch.is_tensor(work.call()) or name.startswith(("add_rms_norm", "scatter"))


def test_what_was_promised_of_kernels_is_held_against_them() -> None:
    """Decode attention of both lengths, prefill attention beside the matrix rate and torch's own,
    and whatever else only moves data."""
    bars = {name: made.bar.limit for name, made in MEASURES.items() if made.bar is not None}
    assert {bars[name] for name in bars if name.startswith("decode attention, 64 × 8,192")} == {0.8}
    assert {bars[name] for name in bars if name.startswith("decode attention, 1 × 131,072")} == {
        0.7
    }
    prefill = [bars[name] for name in bars if name.startswith("prefill attention, 16,384")]
    assert prefill == [0.55, 1.0, 1.0]  # the matrix rate; torch's default; flex attention
    assert "prefill attention, 16,384, larger tiles, beside cuDNN" in MEASURES
    moved = ("add_rms_norm", "silu_mul", "rope_and_cache", "gather", "scatter", "drawn_tokens")
    assert {bars[name] for name in bars if name.startswith(moved)} == {0.85}


def test_a_reference_that_is_not_there_skips_its_row_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rate_of(work: Work) -> Callable[[], float]:
        if work.amount == LACKING:
            raise RuntimeError("No available kernel.\nAborting execution.")
        return lambda: work.amount

    def lacking(_sizes: Sizes) -> Work:
        return Work(lambda: None, LACKING)

    there = Measure("GFLOP/s", "it", lambda _: Work(lambda: None, 2.0), lambda _: OURS)
    may_lack = replace(there, reference="cuDNN", limit_of=lacking, reference_may_lack=True)
    monkeypatch.setattr(kernels, "_rate_of", rate_of)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "MEASURES", {"a": there, "b": may_lack, "c": there})
    options = Options(quick=True, arguments=argparse.Namespace())
    first, second, third = measure(options)
    assert (first.ratio, third.ratio) == (2.0, 2.0)
    assert (second.value, second.skipped) == (None, "cuDNN is not available: No available kernel.")
    monkeypatch.setattr(kernels, "MEASURES", {"d": replace(there, limit_of=lacking)})
    with pytest.raises(RuntimeError, match="No available kernel"):
        list(measure(options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_every_row_is_skipped_with_the_reason() -> None:
    rows = list(measure(Options(quick=True, arguments=argparse.Namespace())))
    assert [row.name for row in rows] == list(MEASURES)
    assert {row.skipped for row in rows} == {"needs a CUDA device"}
