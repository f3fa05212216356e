"""The router's decisions where people see them: in answers that ask why, and in the log."""

import asyncio
import json
import logging
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI

from pdserve.cluster.gateway.calls import Piece
from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.metrics import FrontMetrics
from pdserve.cluster.rpc.servicer import Servicer
from pdserve.cluster.rpc.serving import Serving
from pdserve.config import GatewayConfig
from pdserve.errors import WorkerLost
from pdserve.ids import WorkerId
from pdserve.messages import Decision, FinishReason
from pdserve.proto.v1 import inference_pb2 as pb
from tests.unit.cluster.asgi import post
from tests.unit.cluster.fake_session import TIMING, FakeSession, Script, piece, said, steps

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}]}
WHY = {"pdserve": {"why": True}}

FIRST = Decision(
    at_unix_us=1_000_000,
    reason="shortest key",
    waited_us=1500,
    level=2,
    work_us=20_000,
    cached_tokens=3,
    prefill=WorkerId("prefill-1"),
    decode=WorkerId("decode-1"),
    price_us=21_000,
    others=((WorkerId("prefill-2"), 26_500),),
)
SECOND = replace(FIRST, at_unix_us=2_000_000, reason="resumed", prefill=None, others=())

DECISIONS = [
    {
        "choice": 0,
        "at_unix_ms": 1000.0,
        "reason": "shortest key",
        "waited_ms": 1.5,
        "level": 2,
        "work_ms": 20.0,
        "cached_tokens": 3,
        "prefill_worker": "prefill-1",
        "decode_worker": "decode-1",
        "price_ms": 21.0,
        "others": [{"worker": "prefill-2", "price_ms": 26.5}],
    },
    {
        "choice": 0,
        "at_unix_ms": 2000.0,
        "reason": "resumed",
        "waited_ms": 1.5,
        "level": 2,
        "work_ms": 20.0,
        "cached_tokens": 3,
        "prefill_worker": None,
        "decode_worker": "decode-1",
        "price_ms": 21.0,
        "others": [],
    },
]


def decided(script: Script) -> Script:
    """``script`` with the router's decisions in the timing of every piece."""
    timing = replace(TIMING, decisions=(FIRST, SECOND))
    return lambda call: [
        replace(step, timing=timing) if isinstance(step, Piece) else step for step in script(call)
    ]


@pytest.fixture
def session() -> FakeSession:
    return FakeSession(decided(said("Hello", " world")))


@pytest.fixture
def app(session: FakeSession) -> FastAPI:
    return create_app(session, config=GatewayConfig())


# ── HTTP ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "headers"),
    [(WHY, {}), ({}, {"x_pdserve_why": "1"}), ({"pdserve": {}}, {"x_pdserve_why": "True"})],
)
def test_who_asks_why_gets_decisions_and_timing(
    app: FastAPI, body: dict[str, Any], headers: dict[str, str]
) -> None:
    told = post(app, CHAT, ASK | body, **headers).json()["pdserve"]
    assert told["decisions"] == DECISIONS
    assert (told["queue_ms"], told["level"], told["decode_worker"]) == (1.5, 4, "decode-1")


@pytest.mark.parametrize(
    ("body", "headers"),
    [({}, {}), ({"pdserve": {"why": False}}, {}), ({"pdserve": None}, {"x_pdserve_why": "0"})],
)
def test_who_does_not_ask_gets_none_of_it(
    app: FastAPI, body: dict[str, Any], headers: dict[str, str]
) -> None:
    assert "pdserve" not in post(app, CHAT, ASK | body, **headers).json()


def test_timing_alone_comes_without_decisions(app: FastAPI) -> None:
    reply = post(app, CHAT, ASK | {"include_timing": True})
    assert "decisions" not in reply.json()["pdserve"]
    assert "decisions" not in json.loads(reply.headers["x-pdserve-timing"])


def test_a_stream_says_why_in_its_last_chunk(app: FastAPI) -> None:
    *before, last = post(app, CHAT, ASK | WHY | {"stream": True}).events()
    assert last["choices"] == []
    assert last["pdserve"]["decisions"] == DECISIONS
    assert all("pdserve" not in event for event in before)


def test_every_choice_of_every_prompt_says_why(app: FastAPI) -> None:
    told = post(app, COMPLETION, {"prompt": ["a", "b"], "n": 2} | WHY).json()["pdserve"]
    assert [decision["choice"] for decision in told["decisions"]] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("body", "headers", "field"),
    [
        ({"pdserve": {"why": 1}}, {}, "pdserve"),
        ({"pdserve": True}, {}, "pdserve"),
        ({}, {"x_pdserve_why": "yes"}, "x-pdserve-why"),
    ],
)
def test_a_question_that_is_neither_yes_nor_no_is_refused(
    app: FastAPI, body: dict[str, Any], headers: dict[str, str], field: str
) -> None:
    reply = post(app, CHAT, ASK | body, **headers)
    assert (reply.status, reply.error()["param"]) == (400, field)


# ── gRPC ─────────────────────────────────────────────────────────────────────────────────────────


class FakeContext:
    """What the servicer uses of a call's context."""

    def __init__(self) -> None:
        self.written: list[pb.GenerateChunk] = []

    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def write(self, chunk: pb.GenerateChunk) -> None:
        self.written.append(chunk)


@pytest.mark.parametrize("why", [False, True])
def test_a_grpc_call_gets_decisions_where_it_asked(session: FakeSession, why: bool) -> None:
    servicer = Servicer(Serving(session, GatewayConfig(), FrontMetrics()))
    context = FakeContext()
    asyncio.run(servicer.Generate(pb.GenerateRequest(text="hi", why=why), context))
    *before, last = context.written
    assert not any(chunk.HasField("timing") for chunk in before)
    assert [decision.reason for decision in last.timing.decisions] == (
        ["shortest key", "resumed"] if why else []
    )
    if why:
        first, second = last.timing.decisions
        assert (first.waited_us, first.work_us, first.price_us) == (1500, 20_000, 21_000)
        assert [(other.worker, other.price_us) for other in first.others] == [("prefill-2", 26_500)]
        assert (second.prefill_worker, second.decode_worker) == ("", "decode-1")


# ── the log ──────────────────────────────────────────────────────────────────────────────────────


def test_the_log_is_off_until_it_is_turned_on(
    app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):  # of the root: it does not reach this logger
        post(app, CHAT, ASK)
    assert [record for record in caplog.records if record.name == "pdserve.why"] == []


def test_a_finished_choice_is_one_line(app: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pdserve.why"):
        post(app, CHAT, ASK | {"n": 2, "user": "ann"})
    told = [json.loads(record.message) for record in caplog.records]
    assert [line["choice"] for line in told] == [0, 1]
    line = told[0]
    assert (line["tenant"], line["finish"], line["generated_tokens"]) == ("ann", "stop", 11)
    assert [decision["reason"] for decision in line["decisions"]] == ["shortest key", "resumed"]
    assert (line["queue_ms"], line["prompt_tokens"]) == (1.5, 20)
    assert "Hello" not in caplog.text  # lengths and times, never text


def test_a_failure_ends_every_choice_that_was_open(
    session: FakeSession, app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    session.script = decided(
        steps(piece("a", finish=FinishReason.STOP), piece("b", choice=1), WorkerLost("gone"))
    )
    with caplog.at_level(logging.INFO, "pdserve.why"):
        post(app, CHAT, ASK | {"n": 3})
    told = [json.loads(record.message) for record in caplog.records]
    ends = [(line["choice"], line.get("finish"), line.get("error")) for line in told]
    assert ends == [(0, "stop", None), (1, None, "worker_lost"), (2, None, "worker_lost")]
    assert [len(line["decisions"]) for line in told] == [2, 2, 0]
