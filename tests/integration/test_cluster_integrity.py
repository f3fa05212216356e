"""What happens to a KV block that changed on its way: noticed and computed again, never used."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from pdserve.cluster.worker_parts import FLIP_ENV
from tests.integration.harness import held, running, settings, wait_for, wait_until_equal

OUTPUT_TOKENS = 24
FLIPPED = (2, 3, 5)


def _prompt(length: int = 200) -> list[int]:
    chance = random.Random(11)
    return [chance.randrange(20, 40_000) for _ in range(length)]


def _answer(
    model: Path, monkeypatch: pytest.MonkeyPatch, *, flipped: Sequence[int], verify: bool
) -> tuple[list[int], int, int]:
    """The tokens of a fresh cluster's first answer, its checksum failures and lost attempts."""
    monkeypatch.setenv(FLIP_ENV, ",".join(map(str, flipped)))
    config = settings(model, model={"dtype": "float32"}, store={"verify": verify})
    with running(config) as cluster:
        tokens = cluster.tokens(_prompt(), OUTPUT_TOKENS)
        if flipped and verify:
            wait_for(
                "the failures to be reported",
                lambda: cluster.counter("decode", "checksum_failures") > 0,
                timeout_s=5,
            )
        wait_until_equal("held at rest", lambda: held(cluster), 0)
        failures = cluster.counter("decode", "checksum_failures")
        return tokens, failures, cluster.status()["counters"].get("lost", 0)


def test_a_flipped_bit_is_found_and_the_answer_is_right(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, failures, lost = _answer(small_model, monkeypatch, flipped=(), verify=True)
    assert len(expected) == OUTPUT_TOKENS
    assert (failures, lost) == (0, 0)

    wrong, failures, lost = _answer(small_model, monkeypatch, flipped=FLIPPED, verify=False)
    assert wrong != expected, "the fault must be one that shows"
    assert (failures, lost) == (0, 0)

    right, failures, lost = _answer(small_model, monkeypatch, flipped=FLIPPED, verify=True)
    assert right == expected
    assert 1 <= failures <= len(FLIPPED)
    assert lost == failures, "each costs one attempt"
