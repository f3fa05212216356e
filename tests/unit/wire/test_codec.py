"""The codec: what goes in comes out, and nothing else gets in."""

import dataclasses
import tracemalloc
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, get_args, get_origin
from unittest.mock import patch

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve import messages
from pdserve.clock import SinceUs, SteadyMs
from pdserve.errors import ErrorInfo, FrameError
from pdserve.ids import BlockKey, RequestId, WorkerId
from pdserve.messages import Cancel, Report, Token, TokenBatch, TokenDelta, TokenLogprob
from pdserve.wire.codec import MESSAGES, Codec
from pdserve.wire.frame import MESSAGE_BYTES_MAX

MESSAGE_TYPES = [
    value
    for value in vars(messages).values()
    if dataclasses.is_dataclass(value) and isinstance(value, type)
]


NO_KEY = BlockKey(b"")


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Circle:
    radius: float


@dataclass(frozen=True, slots=True)
class Square:
    side: float
    colour: Colour


@dataclass(frozen=True, slots=True)
class Nothing:
    pass


@dataclass(frozen=True, slots=True)
class Everything:
    """One field per kind of hint."""

    whole: int = 0
    key: BlockKey = NO_KEY
    real: float = 0.0
    flag: bool = False
    maybe: int | None = None
    plain: str | int | None = None
    colour: Colour = Colour.RED
    pairs: tuple[tuple[int, float], ...] = ()
    numbers: Mapping[str, int] = field(default_factory=dict)
    shapes: tuple[Circle | Square, ...] = ()
    shape: Circle | Square | None = None
    until: SteadyMs = 0
    since: SinceUs = 0
    circle: Circle | None = None
    circles: Mapping[str, Circle] = field(default_factory=dict)


CODEC = Codec([Everything, Nothing])
NOW_MS = 1_700_000_000_000


def at(now_ms: int, us: int = 0) -> Any:
    """By the clock of the process that encodes, or of the one that decodes."""
    return patch.multiple(
        "pdserve.wire.codec",
        steady_unix_ms=lambda: now_ms,
        steady_unix_us=lambda: now_ms * 1000 + us,
    )


def wire_form(message: object) -> list[Any]:
    """What the message looks like to msgpack, to be damaged."""
    value: list[Any] = msgpack.unpackb(CODEC.encode(message))
    return value


def position(name: str) -> int:
    return 1 + [item.name for item in dataclasses.fields(Everything)].index(name)


def values(hint: Any) -> st.SearchStrategy[Any]:  # noqa: PLR0911  (one return per kind of hint)
    """Any value of a hint, within what 64 bits can hold."""
    while isinstance(hint, typing.NewType):
        hint = hint.__supertype__
    plain = {int: st.integers(-(2**63), 2**64 - 1), float: st.floats(allow_nan=False)}
    if hint in plain:
        return plain[hint]
    if hint == SteadyMs:
        # One that has passed, or passes now, comes back as passed a moment ago.
        return st.sampled_from((0, NOW_MS - 1)) | st.integers(NOW_MS + 1, 2**63)
    if hint == SinceUs:
        return st.integers(0, NOW_MS * 1000)
    arguments = get_args(hint)
    if isinstance(hint, types.UnionType):
        return st.one_of(*map(values, arguments))
    if get_origin(hint) is tuple and arguments[-1] is ...:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if get_origin(hint) is tuple:
        return st.tuples(*map(values, arguments))
    if get_origin(hint) is Mapping:
        return st.dictionaries(st.text(), values(arguments[1]), max_size=3)
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        hints = typing.get_type_hints(hint, include_extras=True)
        return st.builds(hint, **{name: values(part) for name, part in hints.items()})
    return st.from_type(hint)


@pytest.mark.parametrize("cls", MESSAGE_TYPES)
@settings(max_examples=10)
@given(data=st.data())
def test_every_message_comes_back_as_it_was(cls: type, data: st.DataObject) -> None:
    message = data.draw(values(cls))
    with at(NOW_MS):
        assert MESSAGES.decode(MESSAGES.encode(message)) == message


@given(values(Everything))
def test_every_kind_of_hint_comes_back_as_it_was(message: Everything) -> None:
    with at(NOW_MS):
        back = CODEC.decode(CODEC.encode(message))
    assert back == message
    assert isinstance(back, Everything)
    assert type(back.colour) is Colour
    assert type(back.real) is float


@given(st.integers(0, 2**50), st.integers(0, 2**50), st.integers(0, 2**50))
def test_an_instant_keeps_its_distance_whatever_the_other_clock_says(
    here_ms: int, there_ms: int, left_ms: int
) -> None:
    with at(here_ms):
        data = CODEC.encode(Everything(until=here_ms + left_ms + 1))
    with at(there_ms):
        assert CODEC.decode(data) == Everything(until=there_ms + left_ms + 1)


@given(st.integers(1, 2**50), st.integers(2, 2**50), st.data())
def test_an_instant_that_has_passed_has_passed_there_too(
    here_ms: int, there_ms: int, data: st.DataObject
) -> None:
    passed_ms = data.draw(st.integers(1, here_ms))
    with at(here_ms):
        sent = CODEC.encode(Everything(until=passed_ms))
    with at(there_ms):
        assert CODEC.decode(sent) == Everything(until=there_ms - 1)


@given(st.integers(1, 2**50), st.integers(1, 2**50), st.data())
def test_what_is_past_is_as_long_ago_there_or_began_with_its_clock(
    here_us: int, there_us: int, data: st.DataObject
) -> None:
    """Never in the future, never negative, and not "none" either, which is 0."""
    ago_us = data.draw(st.integers(0, here_us - 1))
    with at(0, here_us):
        sent = CODEC.encode(Everything(since=here_us - ago_us))
    with at(0, there_us):
        assert CODEC.decode(sent) == Everything(since=max(1, there_us - ago_us))


def test_a_past_that_lies_ahead_is_now() -> None:
    """As where an instant was rounded up."""
    with at(NOW_MS):
        back = CODEC.decode(CODEC.encode(Everything(since=NOW_MS * 1000 + 999)))
    assert back == Everything(since=NOW_MS * 1000)


def test_an_instant_that_never_comes_never_comes_there_either() -> None:
    assert CODEC.decode(CODEC.encode(Everything())) == Everything()


def test_a_message_without_fields_comes_back() -> None:
    assert CODEC.decode(CODEC.encode(Nothing())) == Nothing()


def test_an_int_is_taken_for_a_float_and_becomes_one() -> None:
    back = CODEC.decode(CODEC.encode(Everything(real=3)))
    assert isinstance(back, Everything)
    assert type(back.real) is float


def test_every_codec_knows_error_infos() -> None:
    info = ErrorInfo("queue_full", "full", None, 50)
    assert CODEC.decode(CODEC.encode(info)) == info


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("whole", 1.0),
        ("whole", True),
        ("whole", None),
        ("key", "text"),
        ("real", "1"),
        ("flag", 1),
        ("maybe", "1"),
        ("plain", 1.5),
        ("plain", b"x"),
        ("colour", "green"),
        ("colour", ["red"]),
        ("pairs", [[1, 2.0, 3]]),
        ("pairs", [1]),
        ("pairs", {"a": 1}),
        ("numbers", {"a": "b"}),
        ("numbers", {b"a": 1}),
        ("numbers", [1]),
        ("shapes", [["Triangle", 1.0]]),
        ("shapes", [["Circle"]]),
        ("shapes", [[["Circle"], 1.0]]),
        ("shapes", [[{"Circle": 1}, 1.0]]),
        ("shapes", [[]]),
        ("shapes", ["Circle"]),
        ("circle", [1.0, 2.0]),
        ("circle", []),
        ("circle", 1.0),
        ("circles", {"a": None}),
    ],
)
def test_a_wrong_type_is_refused_by_name(name: str, value: object) -> None:
    form = wire_form(Everything())
    form[position(name)] = value
    with pytest.raises(FrameError, match=rf"(Everything\.{name}|Circle(\.radius)?) is .*must be"):
        CODEC.decode(msgpack.packb(form))


@pytest.mark.parametrize(
    "form",
    [
        [],
        {},
        None,
        "Nothing",
        [7],
        [b"Nothing"],
        [["Nothing"]],
        ["Nobody"],
        ["Nothing", 1],
        ["Everything"],
        ["Cancel", "r"],
    ],
)
def test_what_is_no_message_of_the_codec_is_refused(form: object) -> None:
    with pytest.raises(FrameError):
        CODEC.decode(msgpack.packb(form))


def test_one_field_more_or_less_is_refused() -> None:
    form = wire_form(Everything())
    for damaged in (form[:-1], [*form, None]):
        with pytest.raises(FrameError, match="Everything"):
            CODEC.decode(msgpack.packb(damaged))


def test_extension_types_and_trailing_bytes_are_refused() -> None:
    with pytest.raises(FrameError):
        CODEC.decode(msgpack.packb(["Nothing", msgpack.ExtType(1, b"x")]))
    with pytest.raises(FrameError):
        CODEC.decode(CODEC.encode(Nothing()) + b"\x00")


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        MESSAGES.decode(data)


BATCH = TokenBatch(
    WorkerId("decode-1"),
    (
        TokenDelta(
            RequestId("r-1"), 0, 7, (Token(5, TokenLogprob(-0.5, ((5, -0.5), (6, -1.5)))), Token(9))
        ),
    ),
)


@given(st.data())
def test_truncated_and_mutated_bytes_are_refused_or_make_another_message(
    data: st.DataObject,
) -> None:
    good = bytearray(MESSAGES.encode(BATCH))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    try:
        message = MESSAGES.decode(bytes(good[: len(good) - cut]))
    except FrameError:
        return
    assert cut == 0
    again = MESSAGES.encode(message)  # bytes are compared, because NaN does not equal itself
    assert MESSAGES.encode(MESSAGES.decode(again)) == again


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of four billion
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,  # nested too deep
        b"\xdd\x00\x00\x27\x10" * 2_000,  # each claims the whole length, nested
    ],
)
def test_claimed_sizes_cost_no_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            MESSAGES.decode(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64 * len(data) + 100_000


def test_a_message_over_the_limit_is_refused_on_both_sides() -> None:
    too_long = Cancel(RequestId("r" * MESSAGE_BYTES_MAX))
    with pytest.raises(FrameError, match=f"the limit is {MESSAGE_BYTES_MAX}"):
        MESSAGES.encode(too_long)
    with pytest.raises(FrameError, match=f"the limit is {MESSAGE_BYTES_MAX}"):
        MESSAGES.decode(bytes(MESSAGE_BYTES_MAX + 1))


def test_a_callers_mistakes_are_type_errors() -> None:
    with pytest.raises(TypeError, match="Everything is not a message type"):
        MESSAGES.encode(Everything())
    with pytest.raises(TypeError):
        MESSAGES.encode(Cancel(object()))  # type: ignore[arg-type]

    @dataclass
    class Bad:
        value: list[int]

    with pytest.raises(TypeError, match=r"Bad\.value.*cannot stand in a message"):
        Codec([Bad])


def test_defaults_do_not_fill_in_for_what_the_peer_left_out() -> None:
    report = MESSAGES.encode(Report(WorkerId("w"), 0, False, 0, 0, 0))
    form = msgpack.unpackb(report)
    with pytest.raises(FrameError, match="Report"):
        MESSAGES.decode(msgpack.packb(form[:-1]))
