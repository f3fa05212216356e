"""Logs: one line of JSON each, the request's id, and what a storm leaves of itself."""

import json
import logging
import sys
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from pdserve.clock import S
from pdserve.cluster import logs
from pdserve.cluster.http.request_ids import RequestIds
from pdserve.cluster.logs import JsonFormatter, TextFormatter
from pdserve.errors import ConfigError
from pdserve.storms import KINDS_MAX, STORM_LINES, StormFilter, log_to_stderr
from tests.unit.cluster.asgi import ask


def record(message: str, *values: object, name: str = "pdserve.test") -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, "", 0, message, values, None)


def test_a_line_of_json_is_one_line() -> None:
    one = record("lost\n%s\u2028", "d-1")
    line = JsonFormatter().format(one)
    assert "\n" not in line
    told = json.loads(line)
    assert (told["level"], told["logger"]) == ("WARNING", "pdserve.test")
    assert told["message"] == "lost\nd-1\u2028"
    assert "request" not in told


def test_a_message_is_bounded_and_an_error_is_told_with_it() -> None:
    try:
        raise ValueError("wrong")
    except ValueError:
        one = logging.getLogger("x").makeRecord(
            "x", logging.ERROR, "", 0, "failed", (), sys.exc_info()
        )
    assert "ValueError: wrong" in json.loads(JsonFormatter().format(one))["message"]
    assert TextFormatter().format(record("y" * 9000)).endswith("… (808 more characters)")


@given(gaps_ms=st.lists(st.integers(0, 4_000), max_size=120))
def test_in_a_storm_few_lines_pass_and_all_are_counted(gaps_ms: list[int]) -> None:
    now_ns = 0
    storm = StormFilter(clock=lambda: now_ns)
    passed: list[int] = []
    counted = 0
    for gap_ms in [*gaps_ms, 10_000]:  # the last one comes after any span
        now_ns += gap_ms * S // 1000
        one = record("worker %s is lost", len(passed))
        if storm.filter(one):
            passed.append(now_ns)
            counted += 1 + getattr(one, "left_out", 0)
    assert counted == len(gaps_ms) + 1
    for at_ns in passed:
        span = [each for each in passed if at_ns <= each < at_ns + 10 * S]
        assert len(span) <= 2 * STORM_LINES


def test_other_lines_pass_in_a_storm_and_memory_is_bounded() -> None:
    storm = StormFilter(clock=lambda: 0)
    assert sum(storm.filter(record("same")) for _ in range(100)) == STORM_LINES
    assert storm.filter(record("other"))
    assert all(storm.filter(record("same", name="pdserve.audit")) for _ in range(100))
    for index in range(2 * KINDS_MAX):
        storm.filter(record(f"kind {index}"))
    assert len(storm._kinds) == KINDS_MAX


def test_what_is_logged_for_a_call_has_its_id() -> None:
    app = FastAPI()
    told: list[str] = []

    @app.get("/")
    async def page() -> None:
        told.append(JsonFormatter().format(record("at work")))
        told.append(TextFormatter().format(record("at work")))

    app.add_middleware(RequestIds)
    ask(app, "GET", "/", b"", headers={"x-request-id": "abc-1"})
    assert json.loads(told[0])["request"] == "abc-1"
    assert told[1] == "WARNING pdserve.test [abc-1]: at work"
    assert "request" not in json.loads(JsonFormatter().format(record("afterwards")))


@pytest.fixture
def _as_before() -> Iterator[None]:
    ours = logging.getLogger("pdserve")
    before = (list(ours.handlers), ours.level, ours.propagate)
    yield
    ours.handlers[:] = before[0]
    ours.setLevel(before[1])
    ours.propagate = before[2]


@pytest.mark.usefixtures("_as_before")
def test_the_environment_says_how(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(logs.FORMAT, "json")
    monkeypatch.setenv(logs.LEVEL, "INFO")
    for _ in range(2):
        logs.start_logging()
    logging.getLogger("pdserve.test").info("hello %s", "you")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "hello you"
    monkeypatch.setenv(logs.FORMAT, "xml")
    with pytest.raises(ConfigError, match="PDSERVE_LOG_FORMAT is 'xml', must be one of text, json"):
        logs.start_logging()


@pytest.mark.usefixtures("_as_before")
def test_who_has_set_up_logging_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(logs.FORMAT, raising=False)
    monkeypatch.delenv(logs.LEVEL, raising=False)
    ours = logging.getLogger("pdserve")
    before = list(ours.handlers)
    assert logging.getLogger().handlers, "pytest's own"
    logs.start_logging()
    assert (ours.handlers, ours.propagate) == (before, True)


def test_a_process_of_its_own_is_bounded_in_a_storm_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.RootLogger(logging.WARNING)
    monkeypatch.setattr(logging, "root", root)
    now_ns = 0
    monkeypatch.setattr(StormFilter.__init__, "__kwdefaults__", {"clock": lambda: now_ns})
    log_to_stderr()
    for peer in range(1000):
        root.warning("%s: %s; connection closed", peer, "a frame begins with b'GET '")
    now_ns = 10 * S
    root.warning("%s: %s; connection closed", "last", "it is over")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == STORM_LINES + 1
    assert lines[-1].endswith("last: it is over; connection closed (990 like this were left out)")
