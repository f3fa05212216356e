"""KServe's and vLLM's services, and reflection's newer version, on a real server."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from pdserve.cluster.http.metrics import FrontMetrics
from pdserve.cluster.rpc.reflecting import V1
from pdserve.cluster.rpc.server import SERVICES
from pdserve.errors import QueueFull
from pdserve.messages import FinishReason
from pdserve.prompt_tasks import Pooling, Scoring
from pdserve.proto.kserve import inference_pb2 as kserve
from pdserve.proto.kserve.inference_pb2_grpc import GRPCInferenceServiceStub
from pdserve.proto.vllm import engine_pb2 as vllm
from pdserve.proto.vllm.engine_pb2_grpc import VllmEngineStub
from tests.integration.grpc_server import WAIT_S, Served
from tests.unit.cluster.fake_session import HANG, MODEL, VECTOR, FakeSession, piece, said, steps
from tests.unit.cluster.test_kserve_requests import asked


@pytest.fixture(scope="module")
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture(scope="module")
def channel(session: FakeSession) -> Iterator[grpc.Channel]:
    served = Served(session, FrontMetrics())
    with grpc.insecure_channel(f"127.0.0.1:{served.server.port}") as channel:
        yield channel
    served.stop()


@pytest.fixture(autouse=True)
def fresh(session: FakeSession) -> None:
    session.script = said("Hello", " world")
    session.calls.clear()
    session.cancelled.clear()
    session.opened.clear()
    session.closed.clear()


@pytest.fixture
def triton(channel: grpc.Channel) -> Any:
    return GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]


@pytest.fixture
def engine(channel: grpc.Channel) -> Any:
    return VllmEngineStub(channel)  # type: ignore[no-untyped-call]


def texts(response: kserve.ModelInferResponse, name: str = "text_output") -> list[str]:
    (output,) = [output for output in response.outputs if output.name == name]
    return [text.decode() for text in output.contents.bytes_contents]


# ── KServe ───────────────────────────────────────────────────────────────────────────────────────


def test_server_and_model_say_what_they_are(triton: Any) -> None:
    assert triton.ServerLive(kserve.ServerLiveRequest()).live
    assert triton.ServerReady(kserve.ServerReadyRequest()).ready
    assert triton.ServerMetadata(kserve.ServerMetadataRequest()).name == "pdserve"
    assert triton.ModelReady(kserve.ModelReadyRequest(name=MODEL)).ready
    assert not triton.ModelReady(kserve.ModelReadyRequest(name="another")).ready
    about = triton.ModelMetadata(kserve.ModelMetadataRequest(name=MODEL))
    assert "text_input" in [tensor.name for tensor in about.inputs]
    config = triton.ModelConfig(kserve.ModelConfigRequest(name=MODEL)).config
    assert config.model_transaction_policy.decoupled
    with pytest.raises(grpc.RpcError) as caught:
        triton.ModelMetadata(kserve.ModelMetadataRequest(name="another"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_one_request_one_answer(triton: Any, session: FakeSession) -> None:
    request = asked(text_input="hi", max_tokens=5, n=2)
    request.model_name = MODEL
    request.id = "of-the-client"
    response = triton.ModelInfer(request)
    assert texts(response) == ["Hello world"] * 2
    assert texts(response, "finish_reason") == ["stop"] * 2
    assert (response.id, response.model_name) == ("of-the-client", MODEL)
    (call,) = session.calls
    assert (bytes(call.prompt), call.n, call.stop.max_tokens) == (b"hi", 2, 5)


def test_requests_of_a_stream_are_answered_side_by_side(triton: Any, session: FakeSession) -> None:
    def one(name: str, **tensors: Any) -> kserve.ModelInferRequest:
        request = asked(text_input=name, **tensors)
        request.model_name = MODEL
        request.id = name
        return request

    final = one("final", stream=True)
    final.parameters["triton_enable_empty_final_response"].bool_param = True
    sent = [one("parts", stream=True), one("whole"), one("wrong", max_tokens=-5), final]
    got: dict[str, list[kserve.ModelStreamInferResponse]] = {}
    for response in triton.ModelStreamInfer(iter(sent), timeout=WAIT_S):
        got.setdefault(response.infer_response.id, []).append(response)
    assert [texts(each.infer_response)[0] for each in got["parts"]] == ["Hello", " world"]
    assert [texts(each.infer_response)[0] for each in got["whole"]] == ["Hello world"]
    (failed,) = got["wrong"]
    assert "max_tokens" in failed.error_message
    assert not failed.infer_response.outputs
    last = [each.infer_response.parameters["triton_final_response"] for each in got["final"]]
    assert [each.bool_param for each in last] == [False, False, True]
    assert not got["final"][-1].infer_response.outputs


def test_a_cancelled_stream_closes_what_it_began(triton: Any, session: FakeSession) -> None:
    session.script = steps(piece("a"), HANG)
    request = asked(text_input="hi", stream=True)
    request.model_name = MODEL
    stream = triton.ModelStreamInfer(iter([request, request]))
    next(stream)
    stream.cancel()
    assert session.closed.wait(WAIT_S)


def test_typed_errors_are_those_of_the_port(triton: Any, session: FakeSession) -> None:
    session.script = steps(QueueFull("full", retry_after_ms=50))
    request = asked(text_input="hi")
    request.model_name = MODEL
    with pytest.raises(grpc.RpcError) as caught:
        triton.ModelInfer(request)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert ("grpc-retry-pushback-ms", "50") in caught.value.trailing_metadata()


# ── vLLM ─────────────────────────────────────────────────────────────────────────────────────────


def generate(**sampling: Any) -> vllm.GenerateRequest:
    return vllm.GenerateRequest(
        request_id="r1",
        tokenized=vllm.TokenizedInput(input_ids=[5, 6]),
        sampling_params=vllm.SamplingParams(**sampling),
    )


def test_tokens_stream_and_the_last_message_has_them_all(engine: Any, session: FakeSession) -> None:
    request = generate(temperature=0, logprobs=1)
    request.stream = True
    *parts, last = engine.Generate(request)
    assert [bytes(part.chunk.token_ids) for part in parts] == [b"Hello", b" world"]
    assert [part.chunk.completion_tokens for part in parts] == [5, 11]
    assert len(parts[0].chunk.output_logprobs.token_logprobs) == 5
    whole = last.complete
    assert (bytes(whole.output_ids), whole.finish_reason) == (b"Hello world", "stop")
    assert (whole.prompt_tokens, whole.completion_tokens, whole.cached_tokens) == (2, 11, 3)
    assert len(whole.output_logprobs.token_ids) == 11
    (call,) = session.calls
    assert (call.call, call.prompt, call.sampling.temperature) == ("r1", (5, 6), 0)
    assert (call.sampling.top_p, call.stop.max_tokens) == (1, 998)


def test_a_prompts_logprobs_come_with_the_first_message_of_a_choice(
    engine: Any, session: FakeSession
) -> None:
    request = vllm.GenerateRequest(
        tokenized=vllm.TokenizedInput(input_ids=[5, 6, 7]),
        sampling_params=vllm.SamplingParams(n=2, prompt_logprobs=1),
        stream=True,
    )
    messages = list(engine.Generate(request, timeout=WAIT_S))
    told = [each.chunk for each in messages if each.HasField("chunk")]
    with_prompt = [each.index for each in told if each.HasField("input_logprobs")]
    assert sorted(with_prompt) == [0, 1]
    complete = [each.complete for each in messages if each.HasField("complete")]
    for each in (*complete, next(each for each in told if each.index == 1)):
        scores = each.input_logprobs
        assert list(scores.token_ids) == [5, 6, 7]
        assert [score.HasField("value") for score in scores.token_logprobs] == [False, True, True]
        assert [score.value for score in scores.token_logprobs] == [0.0, -0.25, -0.5]
        assert [list(top.token_ids) for top in scores.top_logprobs] == [[], [6], [7]]
    (call,) = session.calls
    assert call.task == Scoring(1)


def test_a_prompt_is_embedded(engine: Any, session: FakeSession) -> None:
    request = vllm.EmbedRequest(
        request_id="e-1", tokenized=vllm.TokenizedInput(input_ids=[5, 6, 7])
    )
    answer = engine.Embed(request, timeout=WAIT_S)
    assert list(answer.embedding) == VECTOR.tolist()
    assert (answer.prompt_tokens, answer.embedding_dim) == (3, len(VECTOR))
    (call,) = session.calls
    assert (call.call, call.prompt, call.task) == ("e-1", (5, 6, 7), Pooling())


@pytest.mark.parametrize(
    "request_",
    [
        vllm.EmbedRequest(),
        vllm.EmbedRequest(tokenized=vllm.TokenizedInput(input_ids=[1 << 20])),
        vllm.EmbedRequest(tokenized=vllm.TokenizedInput(input_ids=[1] * 1001)),
        vllm.EmbedRequest(request_id="no name", tokenized=vllm.TokenizedInput(input_ids=[1])),
    ],
)
def test_what_cannot_be_embedded_is_refused(engine: Any, request_: vllm.EmbedRequest) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        engine.Embed(request_, timeout=WAIT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_without_streaming_each_choice_is_one_message(engine: Any, session: FakeSession) -> None:
    session.script = said("ab", finish=FinishReason.LENGTH)
    answers = [each.complete for each in engine.Generate(generate(n=3, max_tokens=2))]
    assert sorted(answer.index for answer in answers) == [0, 1, 2]
    assert {answer.finish_reason for answer in answers} == {"length"}
    assert not any(answer.HasField("output_logprobs") for answer in answers)


@pytest.mark.parametrize(
    "request_",
    [
        vllm.GenerateRequest(request_id="r"),
        vllm.GenerateRequest(text="a", kv_transfer_params_json="{}"),
        vllm.GenerateRequest(text="a", data_parallel_rank=1),
        generate(prompt_logprobs=-1),
        generate(truncate_prompt_tokens=5),
        generate(logprobs=-1),
        generate(structural_tag="{}"),
        generate(logit_bias={-3: 1.0}),
    ],
)
def test_what_is_not_done_is_refused(engine: Any, request_: vllm.GenerateRequest) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(engine.Generate(request_))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_the_engine_says_what_it_is_and_aborts(engine: Any, session: FakeSession) -> None:
    assert engine.HealthCheck(vllm.HealthCheckRequest()).healthy
    about = engine.GetModelInfo(vllm.GetModelInfoRequest())
    assert (about.served_model_name, about.max_context_length) == (MODEL, 1000)
    assert engine.GetServerInfo(vllm.GetServerInfoRequest()).server_type == "pdserve"
    engine.Abort(vllm.AbortRequest(request_ids=["a", "b"]))
    assert session.cancelled == ["a", "b"]


# ── both ─────────────────────────────────────────────────────────────────────────────────────────


def test_every_service_is_healthy_and_reflected_in_both_versions(channel: grpc.Channel) -> None:
    check = health_pb2_grpc.HealthStub(channel)
    for service in SERVICES:
        answer = check.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    for name in (V1, "grpc.reflection.v1alpha.ServerReflection"):
        ask = channel.stream_stream(
            f"/{name}/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            *(
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=service)
                for service in SERVICES
            ),
        ]
        listed, *files = ask(iter(requests), timeout=WAIT_S)
        assert {each.name for each in listed.list_services_response.service} >= set(SERVICES)
        assert all(each.file_descriptor_response.file_descriptor_proto for each in files)
