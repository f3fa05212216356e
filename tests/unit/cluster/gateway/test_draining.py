"""How long a gateway that was asked to end goes on."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pdserve.clock import MS, S
from pdserve.cluster.gateway.draining import (
    CONNECTION_AGE_NS_MAX,
    CONNECTION_AGE_NS_MIN,
    LINGER_NS,
    UNLED_NS,
    Seen,
    connection_age_ns,
    left_ns,
)

LIMIT_NS = 60 * S


def left(seen: Seen, now_ns: int) -> int:
    return left_ns(seen, limit_ns=LIMIT_NS, now_ns=now_ns)


@st.composite
def moments(draw: st.DrawFn) -> tuple[Seen, int]:
    """What may be seen, and when. In whole seconds, so that all spans meet often."""
    asked_s = draw(st.integers(0, 20))
    now_s = asked_s + draw(st.integers(0, 70))
    led_s, idle_since_s = (draw(st.integers(0, now_s)) for _ in range(2))
    is_busy, has_connections = draw(st.booleans()), draw(st.booleans())
    busy_s = now_s if is_busy else idle_since_s
    return Seen(asked_s * S, led_s * S, busy_s * S, is_busy, has_connections), now_s * S


@given(moments())
def test_it_ends_within_its_limit_and_never_before_now(moment: tuple[Seen, int]) -> None:
    seen, now_ns = moment
    span_ns = left(seen, now_ns)
    assert span_ns >= 0
    if span_ns:
        assert now_ns + span_ns <= seen.asked_ns + LIMIT_NS


@given(moments())
def test_without_a_router_it_ends_soon(moment: tuple[Seen, int]) -> None:
    seen, now_ns = moment
    if now_ns >= max(seen.asked_ns, seen.led_ns) + UNLED_NS:
        assert left(seen, now_ns) == 0


@given(moments())
def test_a_call_is_not_cut_while_a_router_leads(moment: tuple[Seen, int]) -> None:
    seen, now_ns = moment
    led = replace(seen, led_ns=now_ns, busy_ns=now_ns, is_busy=True)
    assert (left(led, now_ns) > 0) == (now_ns < seen.asked_ns + LIMIT_NS)


@given(moments())
def test_to_wait_for_what_it_says_leaves_nothing(moment: tuple[Seen, int]) -> None:
    seen, now_ns = moment
    assert left(seen, now_ns + left(seen, now_ns)) == 0


@given(moments())
def test_who_has_no_client_ends_at_once(moment: tuple[Seen, int]) -> None:
    seen, now_ns = moment
    if not (seen.is_busy or seen.has_connections):
        assert left(seen, now_ns) == 0


def test_a_connection_that_idles_is_kept_for_a_request_on_its_way() -> None:
    seen = Seen(asked_ns=10 * S, led_ns=14 * S, busy_ns=13 * S, is_busy=False, has_connections=True)
    assert left(seen, 13 * S) == LINGER_NS
    assert left(seen, 13 * S + LINGER_NS - 1 * MS) == 1 * MS
    assert left(seen, 13 * S + LINGER_NS) == 0


@given(st.integers(2 * S, 1000 * S))
def test_every_connection_grows_old_while_its_gateway_drains(limit_ns: int) -> None:
    age_ns = connection_age_ns(limit_ns=limit_ns)
    assert CONNECTION_AGE_NS_MIN <= age_ns <= CONNECTION_AGE_NS_MAX
    assert 1.1 * age_ns <= limit_ns
