"""A seed is a plan, and a plan says what it would do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.cluster.chaos.plan import DEFAULT_KINDS, KINDS, ROLES, SETTLE_S, drawn
from pdserve.errors import ConfigError


@given(
    st.integers(0, 1 << 32),
    st.floats(10, 600),
    st.lists(st.sampled_from(list(KINDS)), min_size=1, unique=True),
)
def test_strikes_are_within_the_run_and_of_the_kinds_asked_for(
    seed: int, seconds: float, kinds: list[str]
) -> None:
    strikes = drawn(seed, seconds=seconds, kinds=kinds)
    assert strikes
    assert strikes == drawn(seed, seconds=seconds, kinds=kinds)
    assert [strike.at_s for strike in strikes] == sorted(strike.at_s for strike in strikes)
    for strike in strikes:
        assert SETTLE_S <= strike.at_s <= seconds - SETTLE_S
        assert strike.kind in kinds
        assert (strike.role in ROLES) == (strike.kind in ("kill", "stop"))
        assert strike.kind in str(strike)


def test_another_seed_is_another_plan() -> None:
    plans = {drawn(seed, seconds=60, kinds=DEFAULT_KINDS) for seed in range(20)}
    assert len(plans) == 20


@pytest.mark.parametrize(
    ("kinds", "seconds", "message"),
    [
        (["kil"], 60, "'kil' is none of kill, stop"),
        (["clock"], 60, "python -m tests.simulation"),
        (["partition"], 60, "python -m tests.simulation"),
        ([], 60, "name at least one"),
        (["kill"], 4.0, "must be more than 4.0"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_way_out(
    kinds: list[str], seconds: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        drawn(0, seconds=seconds, kinds=kinds)
