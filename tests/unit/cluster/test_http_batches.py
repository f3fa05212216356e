"""Files and batches, what of them is pure: forms, lines, states; and what nobody must send."""

import json
from contextlib import suppress
from typing import Any

import hypothesis.strategies as st
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdserve.batch_config import BatchConfig
from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.batches.form import fields_of_form
from pdserve.cluster.http.batches.lines import (
    ENDPOINTS,
    Line,
    answered,
    given_up,
    lines_of,
    written,
)
from pdserve.cluster.http.batches.routes import FORM_FIELDS
from pdserve.cluster.http.batches.running import cancelled
from pdserve.cluster.http.batches.states import (
    BatchState,
    Record,
    decoded,
    ending,
    new_batch,
    window_s_of,
)
from pdserve.config import GatewayConfig
from pdserve.errors import IllegalTransition, PdserveError
from tests.unit.cluster.asgi import Reply, ask, get, post
from tests.unit.cluster.fake_session import FakeSession

CHAT = "/v1/chat/completions"
BOUNDARY = "0123456789abcdef"
FORM = f"multipart/form-data; boundary={BOUNDARY}"


def form(fields: dict[str, tuple[str | None, bytes]]) -> bytes:
    parts = []
    for name, (filename, data) in fields.items():
        named = "" if filename is None else f'; filename="{filename}"'
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


names = st.text("abc[]_", min_size=1, max_size=8)
data = st.binary(max_size=60).filter(lambda each: BOUNDARY.encode() not in each)


@given(fields=st.dictionaries(names, st.tuples(st.none() | names, data), min_size=1, max_size=5))
def test_a_form_is_what_was_put_into_it(fields: dict[str, tuple[str | None, bytes]]) -> None:
    found = fields_of_form(FORM, form(fields), fields)
    assert {name: (each.filename, each.data) for name, each in found.items()} == fields


@given(
    fields=st.dictionaries(names, st.tuples(st.none() | names, data), min_size=1, max_size=3),
    at=st.integers(0, 10_000),
    noise=st.binary(max_size=5),
)
def test_a_broken_form_is_refused_or_read(
    fields: dict[str, tuple[str | None, bytes]], at: int, noise: bytes
) -> None:
    whole = form(fields)
    cut = at % len(whole)
    for body in (whole[:cut], whole[:cut] + noise + whole[cut:]):
        with suppress(PdserveError):
            fields_of_form(FORM, body, FORM_FIELDS)


def test_of_a_form_only_known_fields_are_read_and_each_of_them_once() -> None:
    once = form({"purpose": (None, b"batch"), "": (None, b"x")})
    assert fields_of_form(FORM, once, FORM_FIELDS).keys() == {"purpose"}
    twice = once.removesuffix(f"--{BOUNDARY}--\r\n".encode()) + once
    assert fields_of_form(FORM, twice, ["no"]) == {}
    with pytest.raises(PdserveError, match="purpose: appears twice"):
        fields_of_form(FORM, twice, FORM_FIELDS)


def test_a_form_that_is_cut_off_is_none() -> None:
    whole = form({"purpose": (None, b"batch"), "file": ("a", b"{}")})
    for end in range(len(whole) - len("--\r\n")):
        with pytest.raises(PdserveError):
            fields_of_form(FORM, whole[:end], FORM_FIELDS)


# ── lines ────────────────────────────────────────────────────────────────────────────────────────


def line(custom_id: str = "a", **fields: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {}} | fields


def file_of(*lines: Any) -> bytes:
    return b"".join(
        (each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines
    )


def problems(data: bytes, lines_max: int = 100) -> list[tuple[str, int | None, str | None]]:
    lines, found = lines_of(data, endpoint=CHAT, lines_max=lines_max)
    assert bool(lines) != bool(found)
    return [(each.code, each.line, each.param) for each in found]


@given(ids=st.lists(st.text(min_size=1, max_size=5), min_size=1, unique=True), blank=st.booleans())
def test_lines_come_in_their_order(ids: list[str], blank: bool) -> None:
    ids = [each for each in ids if each.isprintable()] or ["a"]
    data = file_of(*(line(each, body={"n": at}) for at, each in enumerate(ids)))
    if blank:
        data = b"\n" + data.replace(b"\n", b"\r\n\n")
    lines, found = lines_of(data, endpoint=CHAT, lines_max=len(ids))
    assert not found
    assert lines == [Line(each, {"n": at}) for at, each in enumerate(ids)]


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", [("empty_file", None, None)]),
        (b"\n \n", [("empty_file", None, None)]),
        (b"\xff\xfe{}\n", [("invalid_json_line", 1, None)]),
        (file_of(line(), b"{"), [("invalid_json_line", 2, None)]),
        (file_of(b"[]"), [("invalid_json_line", 1, None)]),
        (file_of(b'{"a": NaN}'), [("invalid_json_line", 1, None)]),
        (file_of({"body": {}}), [("missing_required_parameter", 1, "custom_id")]),
        (file_of(line(custom_id="")), [("invalid_custom_id", 1, "custom_id")]),
        (file_of(line("x" * 513)), [("invalid_custom_id", 1, "custom_id")]),
        (file_of(line(), line()), [("duplicate_custom_id", 2, "custom_id")]),
        (file_of(line(method="GET")), [("invalid_method", 1, "method")]),
        (file_of(line(url="/v1/models")), [("invalid_url", 1, "url")]),
        (file_of(line(url="/v1/embeddings")), [("mismatched_endpoint", 1, "url")]),
        (file_of(line(body="x")), [("missing_required_parameter", 1, "body")]),
        (
            file_of(b"{", line("b"), b"["),
            [("invalid_json_line", 1, None), ("invalid_json_line", 3, None)],
        ),
    ],
)
def test_a_file_that_is_no_batch_says_where(
    data: bytes, found: list[tuple[str, int | None, str | None]]
) -> None:
    assert problems(data) == found


def test_a_file_has_so_many_lines_and_problems_and_no_more() -> None:
    many = file_of(*(line(str(at)) for at in range(6)))
    assert problems(many, 5) == [("too_many_requests", 6, None)]
    assert len(problems(file_of(*[b"{"] * 1000), 2000)) == 100


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    lines_of(data, endpoint=CHAT, lines_max=3)


kinds = st.sampled_from(["good", "bad", "expired"])


@given(kinds=st.lists(kinds, min_size=1, max_size=20))
def test_every_line_is_in_one_file_once(kinds: list[str]) -> None:
    lines = [Line(str(at), {}) for at in range(len(kinds))]
    used = {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    told = {
        "good": lambda each: answered(each, "r", 200, used),
        "bad": lambda each: answered(each, "r", 400, {"error": {}}),
        "expired": lambda each: given_up(each, "r", "batch_expired", "too late"),
    }
    answers = {at: told[kind](lines[at]) for at, kind in enumerate(kinds)}
    found = written(lines, answers)
    good = [json.loads(each)["custom_id"] for each in found.output.splitlines()]
    bad = [json.loads(each)["custom_id"] for each in found.errors.splitlines()]
    assert good == [str(at) for at, kind in enumerate(kinds) if kind == "good"]
    assert bad == [str(at) for at, kind in enumerate(kinds) if kind != "good"]
    assert (found.completed, found.failed) == (len(good), len(bad))
    assert found.has_expired == ("expired" in kinds)
    assert found.usage["total_tokens"] == 5 * len(good)


# ── states ───────────────────────────────────────────────────────────────────────────────────────


def fresh() -> Record:
    return new_batch(
        "batch_1",
        "me",
        endpoint=CHAT,
        input_file="file-1",
        window="24h",
        window_s=86_400,
        metadata=None,
        now_s=100,
    )


class Life(RuleBasedStateMachine):
    """Whatever happens to a batch in whatever order, by whichever gateway."""

    def __init__(self) -> None:
        super().__init__()
        self.record = fresh()
        self.now_s = 100
        self.was_over: BatchState | None = None

    def move(self, state: BatchState) -> None:
        self.now_s += 1
        try:
            self.record = self.record.moved(state, self.now_s)
        except IllegalTransition:
            return

    @rule(state=st.sampled_from(BatchState))
    def anything(self, state: BatchState) -> None:
        self.move(state)

    @rule()
    def cancel(self) -> None:
        self.now_s += 1
        try:
            self.record = cancelled(self.record, self.now_s)
        except IllegalTransition:
            assert self.record.is_over

    @rule(all_answered=st.booleans())
    def end(self, all_answered: bool) -> None:
        was = self.record.state
        if was in (BatchState.FINALIZING, BatchState.CANCELLING):
            self.move(ending(self.record, all_answered=all_answered))
            assert self.record.is_over
            assert (self.record.state is BatchState.CANCELLED) == (was is BatchState.CANCELLING)

    @invariant()
    def what_is_over_stays_so(self) -> None:
        assert self.was_over in (None, self.record.state)
        if self.record.is_over:
            self.was_over = self.record.state

    @invariant()
    def it_says_when_it_came_to_its_state(self) -> None:
        stamp = self.record.batch.get(f"{self.record.state}_at")
        assert self.record.state is BatchState.VALIDATING or stamp is not None
        assert decoded(self.record.encoded()) == self.record


TestLife = Life.TestCase


@pytest.mark.parametrize(
    ("window", "seconds"),
    [
        ("24h", 86_400),
        ("1s", 1),
        ("90m", 5400),
        ("7d", 604_800),
        ("168h", 604_800),
        ("169h", None),
        ("8d", None),
        ("0s", None),
        ("24", None),
        ("24h\n", None),
        ("٣h", None),
    ],
)
def test_a_window(window: str, seconds: int | None) -> None:
    assert window_s_of(window) == seconds


# ── what a client must not send ──────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def app() -> FastAPI:
    config = GatewayConfig(batches=BatchConfig(file_bytes_max=1000, files_max=3))
    return create_app(FakeSession(), config=config)


def upload(app: FastAPI, fields: dict[str, tuple[str | None, bytes]]) -> Reply:
    return ask(app, "POST", "/v1/files", form(fields), headers={"content-type": FORM})


PURPOSE = (None, b"batch")


def refused(reply: Reply, status: int, param: str | None) -> None:
    assert reply.status == status, reply.body
    assert reply.error()["param"] == param
    assert reply.error()["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": PURPOSE}, "file"),
        ({"file": ("a", b"{}")}, "purpose"),
        ({"purpose": (None, b"fine-tune"), "file": ("a", b"{}")}, "purpose"),
        ({"purpose": (None, b"\xff"), "file": ("a", b"{}")}, "purpose"),
        ({"purpose": PURPOSE, "file": ("a", b"")}, "file"),
        ({"purpose": PURPOSE, "file": ("a", b"x" * 1001)}, "file"),
        ({"purpose": PURPOSE, "file": ("a" * 256, b"{}")}, "file"),
        (
            {
                "purpose": PURPOSE,
                "file": ("a", b"{}"),
                "expires_after[anchor]": (None, b"created_at"),
                "expires_after[seconds]": (None, b"9"),
            },
            "expires_after[seconds]",
        ),
        (
            {"purpose": PURPOSE, "file": ("a", b"{}"), "expires_after[seconds]": (None, b"3600")},
            "expires_after[anchor]",
        ),
    ],
)
def test_what_cannot_be_uploaded_is_named(
    app: FastAPI, fields: dict[str, tuple[str | None, bytes]], param: str
) -> None:
    refused(upload(app, fields), 400, param)


def test_a_body_that_is_no_form_is_refused(app: FastAPI) -> None:
    refused(ask(app, "POST", "/v1/files", b"{}", headers={"content-type": "a/b"}), 415, None)
    refused(ask(app, "POST", "/v1/files", b"{}", headers={"content-type": FORM}), 400, None)
    bare = {"content-type": "multipart/form-data"}
    refused(ask(app, "POST", "/v1/files", b"{}", headers=bare), 400, None)
    huge = {"content-type": FORM, "content-length": str(1 << 40)}
    refused(ask(app, "POST", "/v1/files", b"{}", headers=huge), 413, None)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "input_file_id"),
        ({"input_file_id": "file-1"}, 400, "endpoint"),
        ({"input_file_id": "file-1", "endpoint": "/v1/models"}, 400, "completion_window"),
        ({"completion_window": "25x"}, 400, "completion_window"),
        ({"endpoint": "/v1/models"}, 400, "endpoint"),
        ({"input_file_id": "file-1"}, 400, "input_file_id"),
        ({"input_file_id": "batch_1"}, 400, "input_file_id"),
        ({"metadata": {"a": 1}}, 400, "metadata"),
        ({"metadata": {str(at): "" for at in range(17)}}, 400, "metadata"),
        ({"output_expires_after": {"anchor": "created_at"}}, 400, "output_expires_after"),
    ],
)
def test_what_cannot_be_a_batch_is_named(
    app: FastAPI, body: dict[str, Any], status: int, param: str
) -> None:
    whole = {"input_file_id": "file-1", "endpoint": CHAT, "completion_window": "24h"}
    if param != "completion_window" or "completion_window" in body:
        body = whole | body if body and param != "endpoint" else body
    if param == "endpoint" and "input_file_id" not in body:
        body = whole | body
    refused(post(app, "/v1/batches", body), status, param)


@pytest.mark.parametrize(
    ("method", "path", "param"),
    [
        ("GET", "/v1/files/file-none", "file_id"),
        ("GET", "/v1/files/batch_1", "file_id"),
        ("DELETE", "/v1/files/file-none", "file_id"),
        ("GET", "/v1/files/file-none/content", "file_id"),
        ("GET", "/v1/batches/batch_none", "batch_id"),
        ("GET", "/v1/batches/file-1", "batch_id"),
        ("POST", "/v1/batches/batch_none/cancel", "batch_id"),
    ],
)
def test_what_is_not_there_is_not_found(app: FastAPI, method: str, path: str, param: str) -> None:
    refused(ask(app, method, path, b""), 404, param)


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/files?limit=0", "limit"),
        ("/v1/files?order=up", "order"),
        ("/v1/files?after=file-none", "after"),
        ("/v1/batches?limit=101", "limit"),
        ("/v1/batches?after=batch_none", "after"),
    ],
)
def test_a_bad_query_is_named(app: FastAPI, path: str, param: str) -> None:
    refused(get(app, path), 400, param)


def test_files_are_kept_listed_and_counted() -> None:
    config = GatewayConfig(batches=BatchConfig(files_max=3))
    app = create_app(FakeSession(), config=config)
    names = []
    for number in range(3):
        reply = upload(
            app, {"purpose": PURPOSE, "file": (f"{number}.jsonl", b"{}" * number + b"x")}
        )
        assert reply.status == 200, reply.body
        names.append(reply.json()["id"])
    refused(upload(app, {"purpose": PURPOSE, "file": ("a", b"{}")}), 429, None)
    listed = get(app, "/v1/files?limit=2").json()
    assert [each["id"] for each in listed["data"]] == names[::-1][:2]
    assert (listed["has_more"], listed["last_id"]) == (True, names[1])
    rest = get(app, f"/v1/files?after={names[1]}").json()
    assert [each["id"] for each in rest["data"]] == names[:1]
    assert get(app, f"/v1/files/{names[2]}").json()["filename"] == "2.jsonl"
    assert get(app, f"/v1/files/{names[2]}/content").body == b"{}{}x"
    assert ask(app, "DELETE", f"/v1/files/{names[0]}", b"").json()["deleted"] is True
    refused(get(app, f"/v1/files/{names[0]}"), 404, "file_id")
    assert upload(app, {"purpose": PURPOSE, "file": ("a", b"{}")}).status == 200


def test_every_endpoint_of_a_batch_is_answered_somewhere() -> None:
    app = create_app(FakeSession(), config=GatewayConfig())
    assert set(app.state.batches.endpoints) == set(ENDPOINTS)
