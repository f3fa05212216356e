import threading
from collections.abc import Iterator, Sequence

import pytest

from pdserve.clock import S
from pdserve.cluster.support.gathering import Source, gather, versions
from pdserve.errors import ConfigError


class Ticking:
    """A clock that moves when it is told."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def never() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()  # whoever waits for it ends


def told(text: str) -> Source:
    return Source("fine", lambda: [("", text)], 30.0)


def test_a_source_that_fails_costs_a_line_and_no_other_source() -> None:
    def refuse() -> Sequence[tuple[str, str]]:
        raise ConfigError("nothing answers at http://ann:hunter2@host")

    def break_down() -> Sequence[tuple[str, str]]:
        raise ZeroDivisionError

    sources = [Source("a", refuse, 30.0), Source("b", break_down, 30.0), told("x")]
    a, b, fine = gather(sources, seconds_max=60.0, clock=Ticking())
    assert "nothing answers" in a.missing
    assert "hunter2" not in a.missing
    assert b.missing.startswith("ZeroDivisionError")
    assert fine.content == b"x"


def test_a_source_that_hangs_is_left_alone(never: threading.Event) -> None:
    def hang() -> Sequence[tuple[str, str]]:
        never.wait()
        return []

    stuck, fine = gather(
        [Source("stuck", hang, 0.01), told("x")], seconds_max=60.0, clock=Ticking()
    )
    assert stuck.missing == "no answer within 0 s"
    assert fine.content == b"x"


def test_when_all_the_time_is_over_nobody_is_asked_any_more() -> None:
    clock = Ticking()

    def take_long() -> Sequence[tuple[str, str]]:
        clock.now_ns += 61 * S
        return [("", "late")]

    late, never_asked = gather(
        [Source("late", take_long, 30.0), told("x")], seconds_max=60.0, clock=clock
    )
    assert late.content == b"late"
    assert never_asked.missing == "60 s in all were over"


def test_a_source_may_have_several_files() -> None:
    source = Source("logs", lambda: [("logs/a.log", "a"), ("logs/b.log", "b")], 30.0)
    assert [p.name for p in gather([source], seconds_max=60.0, clock=Ticking())] == [
        "logs/a.log",
        "logs/b.log",
    ]


def test_versions_name_every_package_that_we_ask_for() -> None:
    packages = versions()["packages"]
    assert {"pdserve", "ray", "torch", "tokenizers"} <= set(packages)
    assert all(packages[name] for name in ("ray", "torch"))
