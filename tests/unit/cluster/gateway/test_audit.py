"""The audit log: what is told, how often, in which file; and what a page elsewhere cannot do."""

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.clock import S
from pdserve.cluster.commands.key_edits import new_key, remove_key
from pdserve.cluster.gateway.access import Doorkeeper
from pdserve.cluster.gateway.audit import LOOK_S, Audit, AuditFile
from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig
from pdserve.errors import ConfigError, Forbidden, Unauthorized
from tests.unit.cluster.asgi import Reply, ask
from tests.unit.cluster.fake_session import FakeSession


class Time:
    now_ns = 0

    def __call__(self) -> int:
        return self.now_ns

    def pass_s(self, seconds: float) -> None:
        self.now_ns += round(seconds * S)


class Lines(list[str]):
    def told(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self]

    def events(self) -> list[str]:
        return [line["event"] for line in self.told()]


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def audit(time: Time, lines: Lines) -> Audit:
    return Audit(lines.append, clock=time, wall_ms=lambda: 1_000)


def test_a_line_is_json_whatever_is_in_it(audit: Audit, lines: Lines) -> None:
    audit.action(key=None, status=200, path="/cluster/\u2028role\n", role="x" * 9999)
    (line,) = lines
    assert line.isascii()
    assert "\n" not in line
    assert json.loads(line) == {
        "at": "1970-01-01T00:00:01.000Z",
        "event": "action",
        "key": None,
        "path": "/cluster/\u2028role\n",
        "role": "x" * 256,
        "status": 200,
    }


def test_looks_are_told_once_a_minute_and_key(audit: Audit, time: Time, lines: Lines) -> None:
    for _ in range(3):
        audit.look(key="ops")
        audit.look(key="other")
        time.pass_s(1)
    assert [line["key"] for line in lines.told()] == ["ops", "other"]
    time.pass_s(LOOK_S)
    audit.look(key="ops")
    assert len(lines) == 3


@given(gaps_ms=st.lists(st.integers(0, 700), min_size=1, max_size=60))
def test_refusals_are_told_once_a_second_and_all_are_counted(gaps_ms: list[int]) -> None:
    time, lines, at_ns = Time(), Lines(), []
    audit = Audit(lines.append, clock=time, wall_ms=lambda: 0)
    for gap_ms in gaps_ms:
        time.pass_s(gap_ms / 1000)
        before = len(lines)
        audit.refusal(why="no key")
        at_ns += [time.now_ns] * (len(lines) - before)
    assert all(after - before >= S for before, after in pairwise(at_ns))
    time.pass_s(1)
    audit.refusal(why="no key")
    assert sum(line["count"] for line in lines.told()) == len(gaps_ms) + 1


# ── the file ─────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 60), max_size=80),
    bytes_max=st.integers(1, 100),
    files_max=st.integers(1, 4),
)
def test_files_are_bounded_and_hold_the_latest_lines(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], bytes_max: int, files_max: int
) -> None:
    directory = tmp_path_factory.mktemp("audit")
    path = directory / "audit.jsonl"
    sharing = [AuditFile(path, bytes_max=bytes_max, files_max=files_max) for _ in range(2)]
    said = [f"{index}:{'x' * length}" for index, length in enumerate(lengths)]
    for index, line in enumerate(said):
        sharing[index % 2].write(line)
    files = [path, *(directory / f"audit.jsonl.{number}" for number in range(1, files_max + 1))]
    assert not files[-1].exists(), "one file more than allowed"
    kept = [line for file in reversed(files) if file.exists() for line in file.read_text().split()]
    assert kept == said[len(said) - len(kept) :], "a line is lost, or out of order"
    assert not said or kept
    for file in files:
        assert not file.exists() or file.stat().st_size < bytes_max + 70
    assert path.stat().st_mode & 0o777 == 0o600


def test_one_that_cannot_be_opened_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.access\.audit_log is .*nowhere"):
        AuditFile(tmp_path / "nowhere" / "log", bytes_max=10, files_max=2)


def test_one_that_cannot_be_written_any_more_loses_no_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "there").mkdir()
    file = AuditFile(tmp_path / "there" / "log", bytes_max=10, files_max=2)
    os.unlink(tmp_path / "there" / "log")
    (tmp_path / "there").rmdir()
    file.write("first")
    file.write("second")
    told = [record.getMessage() for record in caplog.records]
    assert "cannot be written" in told[0]
    assert told[1:] == ["first", "second"]


# ── at the door ──────────────────────────────────────────────────────────────────────────────────


def test_keys_that_come_go_and_change_are_told(
    tmp_path: Path, time: Time, audit: Audit, lines: Lines
) -> None:
    file = tmp_path / "keys.json"
    new_key(file, "ann", tenant="a")
    new_key(file, "bob", tenant="b")
    keeper = Doorkeeper(file, audit=audit, clock=time)
    remove_key(file, "ann")
    file.write_text(file.read_text().replace('"tenant": "b"', '"tenant": "c"'))
    new_key(file, "cid", tenant="c")
    time.pass_s(2)
    with pytest.raises(Unauthorized):
        keeper.admit("wrong", asked={"path": "/v1/models"})
    changed, refused = lines.told()
    assert changed["event"] == "keys"
    assert [changed[what] for what in ("count", "added", "removed", "changed")] == [
        2,
        ["cid"],
        ["ann"],
        ["bob"],
    ]
    assert (refused["why"], refused["path"], refused["count"]) == (
        "an unknown key",
        "/v1/models",
        1,
    )
    file.write_text("{")
    time.pass_s(2)
    with pytest.raises(Unauthorized):
        keeper.admit("wrong")
    assert "cannot be read" in lines.told()[2]["problem"]


ROLE = ("POST", "/cluster/role")
BODY = {"worker": "decode-1", "role": "none"}


class Door:
    """An application whose roles are noted, behind keys or none."""

    def __init__(self, file: Path | None, audit: Audit) -> None:
        self.assigned: list[tuple[str, str]] = []

        async def assign(worker: str, role: str) -> str:
            self.assigned.append((worker, role))
            return "it is the only one" if role == "prefill" else ""

        async def snapshot() -> dict[str, Any]:
            return {}

        self.app = create_app(
            FakeSession(),
            config=GatewayConfig(),
            snapshot=snapshot,
            assign=assign,
            doorkeeper=Doorkeeper(file, audit=audit),
        )

    def ask(self, how: tuple[str, str], body: Any = None, **headers: str) -> Reply:
        named = {"content-type": "application/json", **headers}
        return ask(self.app, *how, BODY if body is None else body, headers=named)


def test_an_action_is_told_with_who_and_what_and_its_outcome(
    tmp_path: Path, audit: Audit, lines: Lines
) -> None:
    file = tmp_path / "keys.json"
    ops = new_key(file, "ops", tenant="operators", admin=True)
    door = Door(file, audit)
    bearer = f"Bearer {ops}"
    assert door.ask(ROLE, authorization=bearer).status == 200
    refused = door.ask(ROLE, BODY | {"role": "prefill"}, authorization=bearer)
    assert refused.status == 400
    assert door.ask(ROLE, b"{", authorization=bearer).status == 400
    told = lines.told()
    assert [(line["status"], line.get("role")) for line in told] == [
        (200, "none"),
        (400, "prefill"),
        (400, None),
    ]
    assert {line["key"] for line in told} == {"ops"}
    assert {line["tenant"] for line in told} == {"operators"}
    assert told[0]["path"] == "/cluster/role"
    assert ops not in "".join(lines)


def test_who_is_no_admin_does_nothing_and_is_told_of(
    tmp_path: Path, audit: Audit, lines: Lines
) -> None:
    file = tmp_path / "keys.json"
    ann = new_key(file, "ann", tenant="a")
    door = Door(file, audit)
    assert door.ask(ROLE).status == 401
    assert door.ask(ROLE, authorization=f"Bearer {ann}").status == 403
    assert door.assigned == []
    assert lines.events() == ["refusal"], "the second within the second is counted later"


def test_looks_of_an_admin_are_told_once(tmp_path: Path, audit: Audit, lines: Lines) -> None:
    file = tmp_path / "keys.json"
    ops = new_key(file, "ops", tenant="o", admin=True)
    door = Door(file, audit)
    for _ in range(3):
        assert door.ask(("GET", "/cluster/status"), authorization=f"Bearer {ops}").status == 200
    assert lines.events() == ["look"]


@pytest.mark.parametrize("keyed", [False, True])
def test_another_sites_page_changes_nothing(
    tmp_path: Path, audit: Audit, lines: Lines, keyed: bool
) -> None:
    file = tmp_path / "keys.json" if keyed else None
    sent = {}
    if file is not None:
        sent = {"authorization": f"Bearer {new_key(file, 'ops', tenant='o', admin=True)}"}
    door = Door(file, audit)
    for origin in ("https://elsewhere.example", "null", "http://here:8001"):
        reply = door.ask(ROLE, **sent, host="here:8000", origin=origin)
        assert (reply.status, reply.error()["code"]) == (403, Forbidden.kind)
    # What a form may send across sites without being asked first is no JSON.
    assert door.ask(ROLE, **sent, **{"content-type": "text/plain"}).status == 415
    assert door.assigned == []
    assert door.ask(ROLE, **sent, host="here:8000", origin="http://here:8000").status == 200
    assert door.ask(ROLE, **sent, host="here:8000").status == 200, "no browser sends it"
    assert lines.told()[0]["origin"] == "https://elsewhere.example"
