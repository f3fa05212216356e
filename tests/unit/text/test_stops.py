import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.text.stops import StopStrings

letters = st.text(alphabet="ab", max_size=12)
stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


def naive(text: str, strings: list[str]) -> tuple[str, str | None]:
    """Look after every character; the longest stop string that ends there counts."""
    for end in range(1, len(text) + 1):
        for stop in sorted(strings, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@given(parts=st.lists(letters), strings=stops)
def test_any_split_agrees_with_looking_after_every_character(
    parts: list[str], strings: list[str]
) -> None:
    stream = StopStrings(strings)
    shown, hit = "", None
    for part in parts:
        text, hit = stream.push(part)
        shown += text
        if hit is not None:
            break
    shown += stream.flush()
    assert (shown, hit) == naive("".join(parts), strings)


@given(parts=st.lists(letters), strings=stops)
def test_no_more_is_held_back_than_may_become_a_stop_string(
    parts: list[str], strings: list[str]
) -> None:
    stream = StopStrings(strings)
    received, shown = "", ""
    for part in parts:
        received += part
        text, hit = stream.push(part)
        shown += text
        if hit is not None:
            return
        held = received[len(shown) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in strings)


def test_text_is_held_until_it_is_settled() -> None:
    stream = StopStrings(["END"])
    assert stream.push("the E") == ("the ", None)
    assert stream.push("N") == ("", None)
    assert stream.push("T") == ("ENT", None)
    assert stream.push("EN") == ("", None)
    assert stream.flush() == "EN"
    assert stream.flush() == ""


def test_what_follows_a_stop_string_is_never_shown() -> None:
    stream = StopStrings(["\n\n"])
    assert stream.push("yes\n\nno") == ("yes", "\n\n")
    assert stream.flush() == ""
    with pytest.raises(AssertionError, match="the stream is over"):
        stream.push("more")


def test_without_stop_strings_nothing_is_held() -> None:
    stream = StopStrings([])
    assert stream.push("text") == ("text", None)
    assert stream.flush() == ""


def test_an_empty_stop_string_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="empty stop string"):
        StopStrings(["a", ""])


def test_a_fork_goes_on_alone() -> None:
    stream = StopStrings(["abc"])
    assert stream.push("xab") == ("x", None)
    fork = stream.fork()
    assert fork.push("c") == ("", "abc")
    assert stream.push("d") == ("abd", None)
