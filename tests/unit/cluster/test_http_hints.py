"""What headers say about time: the earliest counts, and only what a client named is judged."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.cluster.http.hints import (
    DEADLINE_HEADER,
    LIBRARY_HEADERS,
    PROXY_HEADER,
    RETRIES_MAX,
    RETRY_HEADER,
    RETRY_METADATA,
    TIMEOUT_HEADER,
    TIMEOUT_MS_MAX,
    deadline_unix_ms,
    retries_of,
)
from pdserve.errors import InvalidField

NOW = 1_700_000_000_000
LONGEST_MS = 600_000
NO_TIME = ["", "-1", "+1", "1e3", "inf", "nan", "NOT_GIVEN", "None", ".", "1.", "\u0663", "9" * 30]


def _left_ms(headers: dict[str, str], *, stream: bool = False, steady_ms: int = NOW) -> int:
    deadline = deadline_unix_ms(
        headers, now_unix_ms=steady_ms, wall_unix_ms=NOW, longest_ms=LONGEST_MS, stream=stream
    )
    return deadline - steady_ms


@pytest.mark.parametrize(
    ("headers", "whole_ms", "streamed_ms"),
    [
        ({}, LONGEST_MS, LONGEST_MS),
        ({TIMEOUT_HEADER: "2500"}, 2500, 2500),
        ({TIMEOUT_HEADER: "900000"}, 900_000, 900_000),
        ({DEADLINE_HEADER: f"{NOW // 1000 + 3}"}, 3000, 3000),
        ({DEADLINE_HEADER: f"{NOW // 1000}.25"}, 250, 250),
        ({DEADLINE_HEADER: f"{NOW // 1000 - 3}"}, -3000, -3000),
        ({PROXY_HEADER: "15000"}, 15_000, 15_000),
        ({PROXY_HEADER: "900000"}, LONGEST_MS, LONGEST_MS),
        ({LIBRARY_HEADERS[0]: "20"}, 20_000, LONGEST_MS),
        ({LIBRARY_HEADERS[1]: "0.5"}, 500, LONGEST_MS),
        ({TIMEOUT_HEADER: "900000", LIBRARY_HEADERS[1]: "600"}, 600_000, 900_000),
        ({TIMEOUT_HEADER: "2500", PROXY_HEADER: "900"}, 900, 900),
    ],
)
def test_the_earliest_counts(headers: dict[str, str], whole_ms: int, streamed_ms: int) -> None:
    assert _left_ms(headers) == whole_ms
    assert _left_ms(headers, stream=True) == streamed_ms


@pytest.mark.parametrize("jumped_ms", [-3_600_000, 3_600_000])
def test_a_wall_clock_that_was_set_moves_no_deadline(jumped_ms: int) -> None:
    """The client names an instant of the new time; ours is still counted in the old one."""
    headers = {DEADLINE_HEADER: f"{NOW // 1000 + 3}"}
    assert _left_ms(headers, steady_ms=NOW - jumped_ms) == 3000


@pytest.mark.parametrize("text", NO_TIME)
@pytest.mark.parametrize("name", [PROXY_HEADER, *LIBRARY_HEADERS])
def test_a_hint_that_cannot_be_read_is_none(name: str, text: str) -> None:
    assert _left_ms({name: text}) == LONGEST_MS


@pytest.mark.parametrize("text", [*NO_TIME, f"{NOW // 1000 + TIMEOUT_MS_MAX}"])
@pytest.mark.parametrize("name", [TIMEOUT_HEADER, DEADLINE_HEADER])
def test_a_time_that_a_client_names_must_be_one(name: str, text: str) -> None:
    with pytest.raises(InvalidField) as refused:
        _left_ms({name: text})
    assert refused.value.field == name


@given(
    st.dictionaries(
        st.sampled_from([TIMEOUT_HEADER, DEADLINE_HEADER, PROXY_HEADER, *LIBRARY_HEADERS]),
        st.text(max_size=12) | st.integers(0, 10**7).map(str),
    ),
    st.booleans(),
)
def test_whatever_stands_there_is_a_time_or_refused(headers: dict[str, str], stream: bool) -> None:
    try:
        left_ms = _left_ms(headers, stream=stream)
    except InvalidField as error:
        assert error.field in (TIMEOUT_HEADER, DEADLINE_HEADER)  # noqa: PT017
    else:
        assert -NOW <= left_ms <= TIMEOUT_MS_MAX


@pytest.mark.parametrize("name", [RETRY_HEADER, RETRY_METADATA])
def test_retries_are_counted_as_far_as_they_can_be_read(name: str) -> None:
    counts = {"0": 0, "2": 2, "999999": RETRIES_MAX, "": 0, "-1": 0, "two": 0, "9" * 9: 0}
    for text, count in counts.items():
        assert retries_of({name: text}) == count
