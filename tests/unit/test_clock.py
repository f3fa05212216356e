"""Instants on this host, deadlines between hosts."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.clock import MS, US, S, monotonic, steady_unix_ms, unix_ms, until_ns


def test_units_fit_together() -> None:
    assert S == 1000 * MS == 1_000_000 * US


def test_a_deadline_keeps_its_distance_on_another_clock() -> None:
    assert until_ns(1_500, now_unix_ms=1_000, now_ns=7 * S) == 7 * S + 500 * MS


def test_a_deadline_that_has_passed_lies_before_now() -> None:
    assert until_ns(1_000, now_unix_ms=1_001, now_ns=7 * S) == 7 * S - MS


@given(st.integers(0, 2**45), st.integers(0, 2**45), st.integers(0, 2**60))
def test_later_deadlines_stay_later(first: int, second: int, now_ns: int) -> None:
    one, two = (until_ns(d, now_unix_ms=2**44, now_ns=now_ns) for d in (first, second))
    assert (one < two) == (first < second)


def test_the_monotonic_clock_does_not_go_back() -> None:
    readings = [monotonic() for _ in range(100)]
    assert readings == sorted(readings)


def test_steady_time_does_not_follow_a_wall_clock_that_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before_ms = steady_unix_ms()
    set_ns = time.time_ns() - 3600 * S
    monkeypatch.setattr(time, "time_ns", lambda: set_ns)
    assert 0 <= steady_unix_ms() - before_ms < 60_000


def test_wall_time_is_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_234_567_890)
    assert unix_ms() == 1_234
