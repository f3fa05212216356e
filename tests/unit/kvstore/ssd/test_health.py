"""A tier that fails is left alone for a while, for longer each time, and never for good."""

from pdserve.kvstore.ssd.health import PAUSE_S_MAX, PAUSE_S_MIN, Health


def test_a_few_failures_are_allowed_and_a_success_forgives_them() -> None:
    health = Health(3)
    for _ in range(5):
        assert health.failed(0.0) is None
        assert health.failed(0.0) is None
        assert health.is_usable(0.0)
        health.succeeded()
    assert [health.failed(0.0) for _ in range(3)] == [None, None, PAUSE_S_MIN]
    assert not health.is_usable(PAUSE_S_MIN - 0.01)
    assert health.is_usable(PAUSE_S_MIN)


def test_each_failure_after_that_pauses_for_longer_up_to_a_bound() -> None:
    health, now_s, pauses = Health(1), 0.0, []
    for _ in range(40):
        pause_s = health.failed(now_s)
        assert pause_s is not None
        assert not health.is_usable(now_s)
        pauses.append(pause_s)
        now_s += pause_s
        assert health.is_usable(now_s)
    assert pauses[:3] == [PAUSE_S_MIN, 2 * PAUSE_S_MIN, 4 * PAUSE_S_MIN]
    assert pauses[-1] == PAUSE_S_MAX
    health.succeeded()
    assert health.failed(now_s) == PAUSE_S_MIN
