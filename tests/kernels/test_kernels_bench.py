"""The benchmark's own calls, on sizes that the interpreter can do."""

import pytest
import torch

from bench.frame import Options
from bench.kernels import MEASURES, Sizes, measure
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
    moved_blocks=2,
    copy_bytes=64,
    matmul=8,
)


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_and_its_limit_can_be_called(name: str) -> None:
    (_, _, limit_of), work_of = MEASURES[name]
    for work in (work_of(SMALL), limit_of(SMALL)):
        assert work.amount > 0
        assert torch.is_tensor(work.call()) or name.startswith(("add_rms_norm", "scatter"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_every_row_is_skipped_with_the_reason() -> None:
    import argparse

    rows = list(measure(Options(quick=True, arguments=argparse.Namespace())))
    assert [row.name for row in rows] == list(MEASURES)
    assert {row.skipped for row in rows} == {"needs a CUDA device"}
