"""Timings of one request that goes over hosts whose clocks have nothing in common."""

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.engine.sequence import stretch_us
from pdserve.messages import Timing
from pdserve.wire.codec import Codec

CODEC = Codec([Timing])
US_MAX = 10**13
"""Four months, of work and of difference between clocks."""


@dataclass(frozen=True)
class Stay:
    """Of a request at one host, and its way from there to the next one."""

    clock_zero_us: int
    work_us: int  # until it is sent
    way_us: int
    ends_stretch: bool  # somebody measures here, as prefill and decode do


stays = st.lists(
    st.builds(
        Stay,
        clock_zero_us=st.integers(1, US_MAX) | st.just(US_MAX),
        work_us=st.integers(0, US_MAX),
        way_us=st.integers(0, US_MAX),
        ends_stretch=st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


def measured(stays: list[Stay]) -> Timing:
    """By the last host, which ends the stretch; virtual time begins at 0 everywhere."""
    timing, now_us, sent = Timing(), 0, b""
    for index, stay in enumerate(stays):
        zero_us = US_MAX * len(stays) + stay.clock_zero_us
        if index == 0:
            timing = Timing(since_unix_us=zero_us)
        else:
            with _clock(zero_us + now_us):
                found = CODEC.decode(sent)
            assert isinstance(found, Timing)
            timing = found
        now_us += stay.work_us
        here_us = zero_us + now_us
        if stay.ends_stretch or index == len(stays) - 1:
            lasted_us = timing.handoff_us + stretch_us(timing, here_us)
            timing = replace(timing, handoff_us=lasted_us, since_unix_us=here_us)
        with _clock(here_us):
            sent = CODEC.encode(timing)
        now_us += stay.way_us
    return timing


def _clock(now_us: int) -> Any:
    return patch("pdserve.wire.codec.steady_unix_us", lambda: now_us)


@settings(max_examples=50)
@given(stays)
def test_what_hosts_measured_is_the_time_at_hosts_whatever_their_clocks_say(
    stays: list[Stay],
) -> None:
    """So it is never negative, and never more than has passed."""
    assert measured(stays).handoff_us == sum(stay.work_us for stay in stays)


@settings(max_examples=30)
@given(stays, st.integers(1, US_MAX))
def test_another_clock_at_any_host_changes_nothing(stays: list[Stay], zero_us: int) -> None:
    for index, stay in enumerate(stays):
        others = [*stays[:index], replace(stay, clock_zero_us=zero_us), *stays[index + 1 :]]
        assert measured(others).handoff_us == measured(stays).handoff_us
