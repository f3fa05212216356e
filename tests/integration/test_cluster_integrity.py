"""What happens to a KV block that changed on its way: noticed and computed again, never used."""

import random
from pathlib import Path

import pytest

from pdserve.cluster.worker_parts import FLIP_ENV
from tests.integration.harness import (
    TestCluster,
    held,
    running,
    settings,
    wait_for,
    wait_until_equal,
)
from tests.models.reference import reference_tokens

OUTPUT_TOKENS = 24
FLIPPED = (2, 3, 5)


def _prompt() -> list[int]:
    chance = random.Random(11)
    return [chance.randrange(20, 40_000) for _ in range(200)]


@pytest.fixture
def expected(small_model: Path, tmp_path: Path) -> list[int]:
    (tokens,) = reference_tokens(small_model, [_prompt()], OUTPUT_TOKENS, scratch=tmp_path)
    return tokens


def _failures_and_lost(cluster: TestCluster) -> tuple[int, int]:
    wait_until_equal("held at rest", lambda: held(cluster), 0)
    lost = cluster.status()["counters"].get("lost", 0)
    return cluster.counter("decode", "checksum_failures"), lost


@pytest.mark.slow
def test_without_checksums_a_flipped_bit_changes_the_answer(
    careless_cluster: TestCluster, expected: list[int]
) -> None:
    wrong = careless_cluster.tokens(_prompt(), OUTPUT_TOKENS)
    assert len(wrong) == OUTPUT_TOKENS
    assert wrong != expected, "the fault must be one that shows"
    assert _failures_and_lost(careless_cluster) == (0, 0)


def test_a_flipped_bit_is_found_and_the_answer_is_right(
    small_model: Path, expected: list[int]
) -> None:
    config = settings(small_model, model={"dtype": "float32"})
    with running(config, environment={FLIP_ENV: ",".join(map(str, FLIPPED))}) as cluster:
        assert cluster.tokens(_prompt(), OUTPUT_TOKENS) == expected
        wait_for(
            "the failures to be reported",
            lambda: cluster.counter("decode", "checksum_failures") > 0,
            timeout_s=5,
        )
        failures, lost = _failures_and_lost(cluster)
        assert 1 <= failures <= len(FLIPPED)
        assert lost == failures, "each costs one attempt"
