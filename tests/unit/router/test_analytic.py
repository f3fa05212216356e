"""Cost models from data sheets: sizes that can be checked by hand, and the directions of things."""

import pytest

from pdserve.clock import MS, S
from pdserve.router.analytic import (
    A100,
    H100,
    H200,
    L4,
    LLAMA3_8B,
    LLAMA3_70B,
    SHIPPED,
    Deployment,
    analytic_costs,
    explanation,
)


def test_kv_of_a_token_is_what_the_shape_says() -> None:
    assert LLAMA3_8B.kv_token_bytes == 128 * 1024
    assert LLAMA3_70B.kv_token_bytes == 320 * 1024


def test_an_8b_model_on_one_h100_by_hand() -> None:
    costs = analytic_costs(Deployment(H100, LLAMA3_8B))
    # 16.06 GB of weights at 2.68 TB/s are 6.0 ms; 32 layers start in 0.16 ms.
    assert costs.decode.step_ns(1, 0) == pytest.approx(6.16 * MS, rel=0.01)
    # 16.06 GFLOP per token at 544 TFLOP/s are 29.5 µs: 1,000 tokens in 30 ms, and the weights.
    assert costs.prefill_ns(1000) == pytest.approx(36 * MS, rel=0.02)


def test_regimes_meet_where_arithmetic_outlasts_the_weights() -> None:
    for deployment in SHIPPED:
        decode = analytic_costs(deployment).decode
        before, after = decode.large_from - 1, decode.large_from
        # Within one sequence's arithmetic of each other: no cliff, and never cheaper for more.
        assert decode.step_ns(before, 0) < decode.step_ns(after, 0)
        assert decode.step_ns(after, 0) < 1.03 * decode.step_ns(before, 0)


def test_attention_over_cached_tokens_costs_but_less_than_computing_them() -> None:
    costs = analytic_costs(Deployment(A100, LLAMA3_8B))
    assert costs.prefill_ns(1000) < costs.prefill_ns(1000, 8000) < costs.prefill_ns(9000)


def test_better_hardware_is_not_slower() -> None:
    l4, a100, h100, h200 = (
        analytic_costs(Deployment(x, LLAMA3_8B)) for x in (L4, A100, H100, H200)
    )
    for slow, fast in ((l4, a100), (a100, h100), (h100, h200)):
        assert fast.prefill_ns(2000) <= slow.prefill_ns(2000)
        assert fast.decode.step_ns(16, 16_000) <= slow.decode.step_ns(16, 16_000)


def test_more_accelerators_help_by_less_than_their_number() -> None:
    four, eight = (analytic_costs(Deployment(H100, LLAMA3_70B, count)) for count in (4, 8))
    ratio = four.prefill_ns(4000) / eight.prefill_ns(4000)
    assert 1.5 < ratio < 2.0


def test_everything_shipped_fits_into_its_memory_and_says_so() -> None:
    for deployment in SHIPPED:
        assert explanation(deployment)["kv_capacity_tokens"] > 16_000, deployment.name
        assert analytic_costs(deployment).origin == "analytic"
        assert analytic_costs(deployment).handoff.time_ns(0) == S // 2000
