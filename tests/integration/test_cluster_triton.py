"""The Triton path behind the whole cluster, in Triton's interpreter, on the CPU."""

from pathlib import Path

import pytest

from tests.integration.harness import TestCluster, running, settings
from tests.models.reference import reference_tokens

PROMPT = list(range(100, 140))
OUTPUT_TOKENS = 6


@pytest.mark.slow
def test_the_triton_path_serves_and_its_kernels_ran(small_model: Path, tmp_path: Path) -> None:
    config = settings(
        small_model,
        model={"dtype": "float32", "kernels": "triton"},
        prefill={"threads": 1, "pool_blocks": 32},
        decode={"threads": 1, "pool_blocks": 32},
        store={"arena_bytes": 16 << 20},
    )
    expected = reference_tokens(small_model, [PROMPT], OUTPUT_TOKENS, scratch=tmp_path)
    with running(config, environment={"TRITON_INTERPRET": "1"}) as cluster:
        assert [cluster.tokens(PROMPT, OUTPUT_TOKENS)] == expected
        _assert_ran_on(cluster, "triton", "cpu")


def test_the_cpu_path_serves_where_nobody_asks_for_another(
    cluster: TestCluster, small_model: Path, tmp_path: Path
) -> None:
    expected = reference_tokens(small_model, [PROMPT], OUTPUT_TOKENS, scratch=tmp_path)
    assert [cluster.tokens(PROMPT, OUTPUT_TOKENS)] == expected
    _assert_ran_on(cluster, "cpu", "triton")


def _assert_ran_on(cluster: TestCluster, path: str, other: str) -> None:
    for role in ("prefill", "decode"):
        assert cluster.counter(role, f"calls_{path}_attention") > 0
        assert cluster.counter(role, f"calls_{other}_attention") == 0
