"""A span per choice, in the client's trace, with the router's decisions as events."""

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from pdserve.cluster import tracing
from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.metrics import FrontMetrics
from pdserve.cluster.rpc.servicer import Servicer
from pdserve.cluster.rpc.serving import Serving
from pdserve.config import GatewayConfig
from pdserve.errors import ConfigError, WorkerLost
from pdserve.ids import WorkerId
from pdserve.messages import Decision, Timing
from pdserve.proto.v1 import inference_pb2 as pb
from tests.unit.cluster.asgi import post
from tests.unit.cluster.fake_session import FakeSession, piece, said, steps
from tests.unit.cluster.test_why import ASK, CHAT, decided

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


def named(exported: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exported.get_finished_spans() if span.name == name]


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


def test_every_choice_is_a_span_in_the_clients_trace(exported: InMemorySpanExporter) -> None:
    app = create_app(FakeSession(decided(said("Hello"))), config=GatewayConfig())
    post(app, CHAT, ASK | {"n": 2, "user": "ann"}, traceparent=TRACEPARENT)
    assert {trace_of(span) for span in exported.get_finished_spans()} == {TRACE_ID}
    spans = named(exported, "pdserve.choice")
    assert len(spans) == 2
    attributes = dict(spans[0].attributes or {})
    assert attributes["pdserve.tenant"] == "ann"
    assert attributes["pdserve.finish"] == "stop"
    assert attributes["pdserve.queue_ms"] == 1.5
    assert [event.name for event in spans[0].events] == ["shortest key", "resumed"]
    first = spans[0].events[0]
    assert first.timestamp == 1_000_000_000
    assert dict(first.attributes or {}) == {
        "pdserve.waited_us": 1500,
        "pdserve.level": 2,
        "pdserve.work_us": 20_000,
        "pdserve.cached_tokens": 3,
        "pdserve.prefill_worker": "prefill-1",
        "pdserve.decode_worker": "decode-1",
        "pdserve.price_us": 21_000,
    }
    assert spans[0].start_time is not None
    assert spans[0].end_time is not None
    assert spans[0].start_time < spans[0].end_time


def test_without_a_trace_of_the_clients_a_span_begins_its_own(
    exported: InMemorySpanExporter,
) -> None:
    app = create_app(FakeSession(said("Hello")), config=GatewayConfig())
    post(app, CHAT, ASK)
    post(app, CHAT, ASK)
    traces = {trace_of(span) for span in exported.get_finished_spans()}
    assert len(traces) == 2
    assert TRACE_ID not in traces


def test_one_trace_leads_from_the_gateway_to_decode(exported: InMemorySpanExporter) -> None:
    """Goal: of a call with two prompts, without a client's trace, all spans are one tree."""
    app = create_app(FakeSession(decided(said("Hello"))), config=GatewayConfig())
    post(app, "/v1/completions", {"prompt": ["one", "two"]})
    spans = exported.get_finished_spans()
    assert len({trace_of(span) for span in spans}) == 1
    (request,) = named(exported, "pdserve.request")
    assert (request.kind, parent_of(request)) == (SpanKind.SERVER, None)
    choices = named(exported, "pdserve.choice")
    assert len(choices) == 2
    for choice in choices:
        assert request.context is not None
        assert choice.context is not None
        assert parent_of(choice) == request.context.span_id
        mine = [span for span in spans if parent_of(span) == choice.context.span_id]
        assert [span.name for span in mine] == [
            *["pdserve.router.wait"] * 2,
            "pdserve.prefill",
            "pdserve.store.handoff",
            "pdserve.decode",
        ]
        workers = [dict(span.attributes or {}).get("pdserve.worker") for span in mine]
        assert workers == [None, None, "prefill-1", "decode-1", "decode-1"]


SMALL_US = st.integers(0, 10_000)


@given(
    timing=st.builds(
        Timing,
        queued_us=SMALL_US,
        prefill_us=SMALL_US,
        handoff_us=SMALL_US,
        decisions=st.lists(
            st.builds(
                Decision,
                at_unix_us=st.integers(0, 20_000),
                reason=st.just("first done"),
                waited_us=SMALL_US,
                level=st.just(0),
                work_us=SMALL_US,
                cached_tokens=st.just(0),
                prefill=st.just(WorkerId("p")),
                decode=st.just(WorkerId("d")),
            ),
            max_size=3,
        ).map(tuple),
    ),
    began_us=SMALL_US,
    length_us=SMALL_US,
)
def test_stages_lie_within_their_choice_whatever_clocks_said(
    timing: Timing, began_us: int, length_us: int
) -> None:
    began_ns, ended_ns = began_us * 1000, (began_us + length_us) * 1000
    stages = tracing.stages_of(timing, began_ns, ended_ns)
    for stage in stages:
        assert began_ns <= stage.began_ns <= stage.ended_ns <= ended_ns
    flow = [stage for stage in stages if stage.name != "pdserve.router.wait"]
    for one, following in pairwise(flow):
        assert one.ended_ns == following.began_ns, "a gap between two stages"
    assert flow[-1].ended_ns == ended_ns


def test_where_clocks_agree_stages_are_as_long_as_was_measured() -> None:
    timing = Timing(queued_us=3, prefill_us=20, handoff_us=7, decode=WorkerId("d"))
    lengths = [
        (stage.name, stage.ended_ns - stage.began_ns)
        for stage in tracing.stages_of(timing, 1_000_000, 1_100_000)
    ]
    assert lengths == [
        ("pdserve.router.wait", 3_000),
        ("pdserve.prefill", 20_000),
        ("pdserve.store.handoff", 7_000),
        ("pdserve.decode", 70_000),
    ]


def test_a_choice_that_fails_says_so(exported: InMemorySpanExporter) -> None:
    session = FakeSession(steps(piece("Hel"), WorkerLost("decode-1 is gone")))
    post(create_app(session, config=GatewayConfig()), CHAT, ASK | {"stream": True})
    (span,) = named(exported, "pdserve.choice")
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "decode-1 is gone"


class FakeContext:
    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("traceparent", TRACEPARENT),)

    async def write(self, chunk: pb.GenerateChunk) -> None:
        pass


def test_grpc_metadata_names_the_trace_as_well(exported: InMemorySpanExporter) -> None:
    serving = Serving(FakeSession(said("Hello")), GatewayConfig(), FrontMetrics())
    servicer = Servicer(serving)
    asyncio.run(servicer.Generate(pb.GenerateRequest(text="hi"), FakeContext()))
    (span,) = named(exported, "pdserve.choice")
    assert trace_of(span) == TRACE_ID


def test_it_is_off_until_an_exporter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tracing.EXPORTER, raising=False)
    tracing.start_tracing()
    assert not tracing.is_tracing()


def test_an_exporter_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracing.EXPORTER, "carrier-pigeon")
    with pytest.raises(ConfigError, match=r"OTEL_TRACES_EXPORTER is 'carrier-pigeon', for which"):
        tracing.start_tracing()


def test_the_exporter_that_the_environment_names_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider is set once per process; the test sees what would be set."""
    provided: list[Any] = []
    monkeypatch.setattr(trace, "set_tracer_provider", provided.append)
    monkeypatch.setenv(tracing.EXPORTER, "console")
    monkeypatch.setattr(tracing, "_tracer", None)
    tracing.start_tracing()
    assert tracing.is_tracing()
    (provider,) = provided
    assert isinstance(provider, TracerProvider)
    assert provider.resource.attributes["service.name"] == "pdserve"
    provider.shutdown()
