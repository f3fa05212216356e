"""The gRPC front on a real server: plain grpcio clients, health, reflection, deadlines, cancels."""

import json
from collections.abc import Iterator
from typing import Any, cast

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pdserve.clock import steady_unix_ms
from pdserve.cluster.http.metrics import FrontMetrics
from pdserve.cluster.rpc.server import serve_grpc
from pdserve.config import GatewayConfig
from pdserve.errors import (
    ConfigError,
    DeadlineExceeded,
    GatewayLeaving,
    InvalidField,
    PdserveError,
    PoisonRequest,
    QueueFull,
    WorkerLost,
)
from pdserve.messages import Beams, FinishReason, Sampling, ServiceClass, Stop
from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.proto.v1.inference_pb2_grpc import InferenceStub
from tests.integration.grpc_server import WAIT_S, Served
from tests.unit.cluster.fake_session import (
    ADAPTER,
    HANG,
    MODEL,
    VOCAB_SIZE,
    FakeSession,
    piece,
    said,
    steps,
)


@pytest.fixture(scope="module")
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture(scope="module")
def metrics() -> FrontMetrics:
    return FrontMetrics()


@pytest.fixture(scope="module")
def served(session: FakeSession, metrics: FrontMetrics) -> Iterator[Served]:
    served = Served(session, metrics)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def channel(served: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{served.server.port}") as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return InferenceStub(channel)  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True)
def fresh(session: FakeSession) -> Iterator[None]:
    session.script = said("Hello", " world")
    session.adapters = ()
    session.calls.clear()
    session.cancelled.clear()
    session.opened.clear()
    session.closed.clear()
    yield
    assert session.open == set()


def chat(**fields: Any) -> pb.ChatRequest:
    return pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="hi")], **fields)


def failed(chunks: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        list(chunks)
    return caught.value


# ── good calls ───────────────────────────────────────────────────────────────────────────────────


def test_a_chat_streams_chunks_and_ends_with_usage(stub: Any, session: FakeSession) -> None:
    chunks = list(stub.Chat(chat()))
    assert [chunk.text for chunk in chunks] == ["Hello", " world"]
    assert bytes(chunks[0].token_ids) == b"Hello"
    assert [chunk.finish_reason for chunk in chunks] == [
        pb.FINISH_REASON_UNSPECIFIED,
        pb.FINISH_REASON_STOP,
    ]
    assert not chunks[0].HasField("usage")
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (20, 11, 3)
    timing = chunks[-1].timing
    assert (timing.queued_us, timing.level, timing.prefill_worker) == (1500, 4, "prefill-1")
    assert 0 < timing.first_token_us <= timing.total_us
    (call,) = session.calls
    assert bytes(call.prompt) == b"user: hi\nassistant: "
    assert call.sampling == Sampling()
    assert call.stop == Stop(max_tokens=980)
    assert call.call == chunks[0].id


def test_a_broken_stream_goes_on_behind_the_last_chunk(stub: Any, session: FakeSession) -> None:
    """Pieces come in other sizes the second time; what was told counts by characters and tokens."""
    session.script = said("Hel", "lo", " wor", "ld")
    chunks = list(stub.Chat(chat(), metadata=(("pdserve-resumable", "1"),)))
    session.script = said("H", "ello w", "orld")
    for told, last in enumerate(chunks, 1):
        again = chat(), (("pdserve-last-event-id", last.event_id),)
        rest = list(stub.Chat(again[0], metadata=again[1]))
        whole = [*chunks[:told], *rest]
        assert "".join(chunk.text for chunk in whole) == "Hello world"
        assert bytes(token for chunk in whole for token in chunk.token_ids) == b"Hello world"
        assert {chunk.id for chunk in whole} == {chunks[0].id}
        assert [chunk.finish_reason for chunk in whole].count(pb.FINISH_REASON_STOP) == 1
        assert whole[-1].usage.completion_tokens == 11
        assert session.cancelled[-1] == chunks[0].id, "should it still run here"
    assert len({call.seed for call in session.calls}) == 1


def test_an_event_id_of_another_request_is_refused_by_name(stub: Any, session: FakeSession) -> None:
    assert [chunk.event_id for chunk in stub.Chat(chat())] == ["", ""], "nobody asked for ids"
    (first, _) = stub.Chat(chat(), metadata=(("pdserve-resumable", "1"),))
    last = (("pdserve-last-event-id", first.event_id),)
    other = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="ho")])
    for request, metadata, problem in (
        (other, last, "belongs to another request"),
        (chat(parameters=pb.Parameters(temperature=0.5)), last, "belongs to another request"),
        (chat(parameters=pb.Parameters(n=2)), last, "belongs to another request"),
        (chat(), (("pdserve-last-event-id", "1.2.3"),), "is no id of an event of ours"),
        (chat(), (("pdserve-resumable", "perhaps"),), "must be 1, true, 0 or false"),
    ):
        error = failed(stub.Chat(request, metadata=metadata))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert problem in error.details()


def test_every_parameter_arrives(stub: Any, session: FakeSession) -> None:
    parameters = pb.Parameters(
        n=2,
        max_tokens=9,
        min_tokens=2,
        temperature=0,
        top_p=0.5,
        top_k=7,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-1,
        frequency_penalty=0.5,
        logit_bias={9: -100, 3: 1.5},
        seed=-1,
        stop=["x", "yz"],
        stop_token_ids=[1, 2],
        ignore_eos=True,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        logprobs=1,
        user="ann",
        service_class=pb.SERVICE_CLASS_INTERACTIVE,
        no_repeat_ngram_size=3,
    )
    request = pb.GenerateRequest(
        model=MODEL, token_ids=pb.TokenIds(ids=[5, 6]), parameters=parameters, id="mine-1"
    )
    chunks = list(stub.Generate(request))
    assert {chunk.choice for chunk in chunks} == {0, 1}
    assert {chunk.id for chunk in chunks} == {"mine-1"}
    score = chunks[0].logprobs[0]
    assert (score.token, score.token_bytes, score.logprob) == ("H", b"H", -0.5)
    assert [best.token_id for best in score.top] == [72]
    (call,) = session.calls
    assert call.prompt == (5, 6)
    assert call.sampling == Sampling(
        0.0, 7, 0.5, 0.1, 1.1, -1.0, 0.5, ((3, 1.5), (9, -100.0)), 1, 3
    )
    assert call.stop == Stop(9, 2, True, (1, 2), ("x", "yz"))
    assert (call.n, call.seed, call.tenant) == (2, 2**63 - 1, "ann")
    assert call.service_class is ServiceClass.INTERACTIVE
    assert call.include_stop_string
    assert not call.skip_special_tokens


def test_a_beam_search_and_best_of_are_asked_for(stub: Any, session: FakeSession) -> None:
    parameters = pb.Parameters(
        n=2, best_of=4, use_beam_search=True, length_penalty=0.5, early_stopping=True
    )
    chunks = list(stub.Chat(chat(parameters=parameters)))
    assert {chunk.choice for chunk in chunks} == {0, 1}
    assert session.calls[0].beams == Beams(4, 2, 0.5, True)
    chunks = list(stub.Chat(chat(parameters=pb.Parameters(best_of=3))))
    assert [chunk.text for chunk in chunks] == ["Hello", " world"]
    assert [len(chunk.logprobs) for chunk in chunks] == [0, 0]
    assert (session.calls[1].n, session.calls[1].sampling.logprobs) == (3, 0)
    error = failed(stub.Chat(chat(parameters=pb.Parameters(use_beam_search=True, temperature=1))))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_generate_defaults_and_stop_reasons(stub: Any, session: FakeSession) -> None:
    session.script = steps(piece("a", finish=FinishReason.STOP, stop_reason="END"))
    (chunk,) = stub.Generate(pb.GenerateRequest(text="x"))
    assert chunk.stop_string == "END"
    assert session.calls[0].stop.max_tokens == 16
    session.script = steps(piece("a", finish=FinishReason.STOP, stop_reason=7))
    (chunk,) = stub.Generate(pb.GenerateRequest(text="x"))
    assert chunk.stop_token_id == 7


def test_an_adapter_is_listed_and_asked_by_its_name(stub: Any, session: FakeSession) -> None:
    session.adapters = (ADAPTER,)
    _, adapter = stub.ListModels(pb.ListModelsRequest()).models
    assert (adapter.id, adapter.context_tokens, adapter.parent) == (ADAPTER, 1000, MODEL)
    list(stub.Generate(pb.GenerateRequest(text="x", model=ADAPTER)))
    list(stub.Chat(chat(model=ADAPTER)))
    list(stub.Chat(chat()))
    assert [call.adapter for call in session.calls] == [ADAPTER, ADAPTER, None]


def test_models_and_cancel(stub: Any, session: FakeSession) -> None:
    (model,) = stub.ListModels(pb.ListModelsRequest()).models
    assert (model.id, model.context_tokens) == (MODEL, 1000)
    assert not stub.Cancel(pb.CancelRequest(id="nobody")).was_running
    session.script = steps(piece("a"), HANG)
    chunks = stub.Chat(chat(id="mine-2"))
    assert next(chunks).id == "mine-2"
    assert stub.Cancel(pb.CancelRequest(id="mine-2")).was_running
    assert session.cancelled == ["nobody", "mine-2"]
    chunks.cancel()
    assert session.closed.wait(WAIT_S)


# ── calls that end early ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("first", [(), (piece("Hel"),)])
def test_a_client_that_cancels_closes_the_call(
    stub: Any, session: FakeSession, first: tuple[Any, ...]
) -> None:
    session.script = steps(*first, HANG)
    chunks = stub.Chat(chat())
    assert session.opened.wait(WAIT_S)
    if first:
        assert next(chunks).text == "Hel"
    chunks.cancel()
    assert session.closed.wait(WAIT_S)


def test_a_client_that_does_not_read_is_let_go_when_it_cancels(
    stub: Any, session: FakeSession
) -> None:
    session.script = lambda _: (piece("x" * 1000) for _ in range(100_000))
    chunks = stub.Chat(chat())
    assert next(chunks).text
    chunks.cancel()
    assert session.closed.wait(WAIT_S)


def test_a_lost_connection_closes_the_call(served: Served, session: FakeSession) -> None:
    session.script = steps(piece("Hel"), HANG)
    with grpc.insecure_channel(f"127.0.0.1:{served.server.port}") as channel:
        stub = InferenceStub(channel)  # type: ignore[no-untyped-call]
        chunks = stub.Chat(chat())
        assert next(chunks).text == "Hel"
    assert session.closed.wait(WAIT_S)


def test_the_clients_deadline_is_the_requests_deadline(stub: Any, session: FakeSession) -> None:
    before = steady_unix_ms()
    list(stub.Chat(chat(), timeout=30))
    list(stub.Chat(chat()))
    own, default = (call.deadline_unix_ms - before for call in session.calls)
    assert own == pytest.approx(30_000, abs=5000)
    assert default == pytest.approx(600_000, abs=5000)


def test_a_channel_that_asks_again_is_known_by_its_metadata(
    served: Served, session: FakeSession
) -> None:
    """By gRPC's own policy for retries, with which the channel says how often it has tried."""
    policy = {
        "maxAttempts": 3,
        "initialBackoff": "0.01s",
        "maxBackoff": "0.01s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    config = {"methodConfig": [{"name": [{}], "retryPolicy": policy}]}
    fails = [WorkerLost("dead"), WorkerLost("dead")]
    session.script = lambda call: [fails.pop()] if fails else said("Hello")(call)
    options = [("grpc.enable_retries", 1), ("grpc.service_config", json.dumps(config))]
    with grpc.insecure_channel(f"127.0.0.1:{served.server.port}", options=options) as channel:
        list(InferenceStub(channel).Chat(chat()))  # type: ignore[no-untyped-call]
    assert [call.retries for call in session.calls] == [0, 1, 2]


def test_a_deadline_that_passes_closes_the_call(stub: Any, session: FakeSession) -> None:
    session.script = steps(HANG)
    assert failed(stub.Chat(chat(), timeout=0.2)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert session.closed.wait(WAIT_S)


# ── errors ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("first", [(), (piece("Hel"),)])
@pytest.mark.parametrize(
    ("error", "code", "metadata"),
    [
        (
            QueueFull("full", retry_after_ms=1500),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            {"pdserve-error-kind": "queue_full", "grpc-retry-pushback-ms": "1500"},
        ),
        (
            InvalidField("messages", "is odd"),
            grpc.StatusCode.INVALID_ARGUMENT,
            {"pdserve-error-kind": "invalid_field", "pdserve-error-field": "messages"},
        ),
        (
            QueueFull("full", retry_after_ms=500_000),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            {"grpc-retry-pushback-ms": "120000"},
        ),
        (
            DeadlineExceeded("late"),
            grpc.StatusCode.DEADLINE_EXCEEDED,
            {"grpc-retry-pushback-ms": "-1"},
        ),
        (
            PoisonRequest("gen-1", 2),
            grpc.StatusCode.INTERNAL,
            {
                "pdserve-error-kind": "poison_request",
                "pdserve-request-id": "gen-1",
                "grpc-retry-pushback-ms": "-1",
            },
        ),
        (WorkerLost("dead"), grpc.StatusCode.UNAVAILABLE, {}),
    ],
)
def test_an_error_ends_the_call_with_its_status(
    stub: Any,
    session: FakeSession,
    error: PdserveError,
    code: grpc.StatusCode,
    metadata: dict[str, str],
    first: tuple[Any, ...],
) -> None:
    session.script = steps(*first, error)
    raised: Any = failed(stub.Chat(chat()))
    assert raised.code() is code
    assert raised.details() == str(error)
    assert metadata.items() <= dict(raised.trailing_metadata()).items()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(), "prompt"),
        (pb.GenerateRequest(text=""), "text"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids.ids"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, VOCAB_SIZE])), "token_ids.ids.1"),
        (pb.GenerateRequest(text="x" * 2000), "text"),
        (pb.GenerateRequest(text="x", id="a b"), "id"),
        (pb.GenerateRequest(text="x", id="x" * 65), "id"),
        (pb.GenerateRequest(text="x", model="gpt-9"), "model"),
        (pb.GenerateRequest(text="x", parameters=pb.Parameters(n=0)), "n"),
        (pb.GenerateRequest(text="x", parameters=pb.Parameters(n=10**9)), "n"),
        (pb.GenerateRequest(text="x", parameters=pb.Parameters(max_tokens=0)), "max_tokens"),
        (pb.GenerateRequest(text="x", parameters=pb.Parameters(max_tokens=2**63)), "max_tokens"),
        (
            pb.GenerateRequest(text="x", parameters=pb.Parameters(temperature=float("nan"))),
            "temperature",
        ),
        (pb.GenerateRequest(text="x", parameters=pb.Parameters(top_p=0)), "top_p"),
        (
            pb.GenerateRequest(text="x", parameters=pb.Parameters(logit_bias={1: float("inf")})),
            "logit_bias",
        ),
        (pb.GenerateRequest(text="x", parameters=pb.Parameters(stop=[""])), "stop.0"),
        (pb.GenerateRequest(text="x", parameters=pb.Parameters(logprobs=21)), "logprobs"),
        (pb.GenerateRequest(text="x", parameters=pb.Parameters(service_class=9)), "service_class"),  # type: ignore[arg-type]
    ],
)
def test_a_bad_request_is_refused_by_name(
    stub: Any, session: FakeSession, request_: pb.GenerateRequest, field: str
) -> None:
    raised: Any = failed(stub.Generate(request_))
    assert raised.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert dict(raised.trailing_metadata())["pdserve-error-field"] == field
    assert session.calls == []


def test_a_chat_without_messages_is_refused(stub: Any) -> None:
    raised: Any = failed(stub.Chat(pb.ChatRequest()))
    assert dict(raised.trailing_metadata())["pdserve-error-field"] == "messages"


def test_a_message_over_the_bound_is_refused(stub: Any, session: FakeSession) -> None:
    raised: Any = failed(stub.Generate(pb.GenerateRequest(text="x" * 200_000)))
    assert raised.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert session.calls == []


# ── what else the port offers ────────────────────────────────────────────────────────────────────


def test_health(channel: grpc.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    for service in ("", "pdserve.v1.Inference"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as unknown:
        stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_describes_the_service(channel: grpc.Channel) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="pdserve.v1.Inference"),
    ]
    listed, described = stub.ServerReflectionInfo(iter(asked))
    names = {service.name for service in listed.list_services_response.service}
    assert {"pdserve.v1.Inference", "grpc.health.v1.Health"} <= names
    file = descriptor_pb2.FileDescriptorProto.FromString(
        described.file_descriptor_response.file_descriptor_proto[0]
    )
    methods = [method.name for method in file.service[0].method]
    assert methods == ["Generate", "Chat", "Cancel", "ListModels"]


def test_calls_are_counted(stub: Any, session: FakeSession, metrics: FrontMetrics) -> None:
    labels = {"front": "grpc", "operation": "generate", "status": "OK"}

    def count() -> float:
        return metrics.registry.get_sample_value("pdserve_requests_total", labels) or 0

    before = count()
    list(stub.Generate(pb.GenerateRequest(text="x")))
    assert count() == before + 1


def test_a_taken_port_is_a_config_error(served: Served, session: FakeSession) -> None:
    config = GatewayConfig(grpc_port=served.server.port)
    with pytest.raises(ConfigError, match=f"grpc_port is {served.server.port}"):
        served.run(serve_grpc(session, config=config))


def test_a_stopped_server_cancels_what_runs(session: FakeSession) -> None:
    served = Served(session, FrontMetrics())
    session.script = steps(piece("Hel"), HANG)
    with grpc.insecure_channel(f"127.0.0.1:{served.server.port}") as channel:
        stub = InferenceStub(channel)  # type: ignore[no-untyped-call]
        chunks = stub.Chat(chat())
        assert next(chunks).text == "Hel"
        served.stop()
        assert session.closed.wait(WAIT_S)
        assert failed(chunks).code() is grpc.StatusCode.UNAVAILABLE


def test_once_it_refuses_every_call_is_told_when_to_ask_again() -> None:
    served = Served(FakeSession(), FrontMetrics())
    try:
        served.server.refuse(GatewayLeaving("this gateway ends", retry_after_ms=1000))
        with grpc.insecure_channel(f"127.0.0.1:{served.server.port}") as channel:
            stub = InferenceStub(channel)  # type: ignore[no-untyped-call]
            health = health_pb2_grpc.HealthStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                stub.ListModels(pb.ListModelsRequest())
            for raised in (cast(Any, caught.value), cast(Any, failed(stub.Chat(chat())))):
                assert raised.code() is grpc.StatusCode.UNAVAILABLE
                assert dict(raised.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
            assert health.Check(health_pb2.HealthCheckRequest()).status
    finally:
        served.stop()
