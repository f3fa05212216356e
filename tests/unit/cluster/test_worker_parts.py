"""Warming up: what runs before the first request, and that nobody takes it for a request's work."""

from types import SimpleNamespace

import pytest

from pdserve.cluster.worker_parts import WARMING_TOKENS, WorkerParts, warm_up
from pdserve.config import ClusterConfig
from pdserve.messages import Role
from tests.unit.engine.fakes import BLOCK_TOKENS, FakeRunner, letters


@pytest.mark.parametrize(
    ("block_count", "chunk"),
    [(100, WARMING_TOKENS), (WARMING_TOKENS // BLOCK_TOKENS, WARMING_TOKENS - 1), (2, 7)],
)
def test_a_chunk_and_a_decode_step_run_as_far_as_the_pool_goes(
    block_count: int, chunk: int
) -> None:
    runner = FakeRunner(block_count)
    warm_up(runner)
    assert runner.steps == [[chunk], [1]]


def test_what_warming_ran_is_not_counted() -> None:
    calls = {"linear": 12, "attention": 4, "sampled": 1}
    runner = SimpleNamespace(ops=SimpleNamespace(name="cpu", calls=lambda: calls))
    parts = WorkerParts(
        config=ClusterConfig(),
        role=Role.DECODE,
        runner=runner,  # type: ignore[arg-type]
        tokenizer=letters(),
        namespace=b"",
        warming_calls={"linear": 10, "attention": 4},
    )
    assert parts.kernel_calls() == {
        "calls_cpu_linear": 2,
        "calls_cpu_attention": 0,
        "calls_cpu_sampled": 1,
    }
