"""vLLM's engine service over the same calls, for gateways that speak it: tokens in, tokens out.

Its requests name no model: where a gateway has several, this service is the first one's.
"""

from typing import Any

from pdserve.clock import S, monotonic
from pdserve.cluster.gateway.calls import Call
from pdserve.cluster.rpc.aborting import aborting
from pdserve.cluster.rpc.requests import generate_call
from pdserve.cluster.rpc.serving import Serving
from pdserve.cluster.rpc.vllm_requests import embed_call, request_of
from pdserve.errors import InvalidField
from pdserve.prompt_tasks import Scoring
from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.proto.vllm import engine_pb2 as vllm
from pdserve.proto.vllm.engine_pb2_grpc import VllmEngineServicer

SERVICE = vllm.DESCRIPTOR.services_by_name["VllmEngine"].full_name

ABORTS_MAX = 4096
"""Requests that one Abort may name."""

_FINISH = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "abort",
    pb.FINISH_REASON_ERROR: "error",
}


class VllmServicer(VllmEngineServicer):
    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._began_ns = monotonic()

    async def Generate(self, request: vllm.GenerateRequest, context: Any) -> None:  # noqa: N802
        serving = self._serving
        async with aborting(context):
            ours = request_of(request, serving.models.first.context_tokens)
            ask = serving.asking(generate_call, ours, context, ours.model)
            answers = _Answers(context, streams=request.stream)
            await serving.run("vllm", ask, context, answers.tell)

    async def Embed(  # noqa: N802
        self, request: vllm.EmbedRequest, context: Any
    ) -> vllm.EmbedResponse | None:
        serving = self._serving
        async with aborting(context):
            ask = serving.asking(embed_call, request, context, "")
            call, found = await serving.embed(ask, context)
            return vllm.EmbedResponse(
                embedding=found.vector.tolist(),
                prompt_tokens=len(call.prompt),
                embedding_dim=len(found.vector),
            )
        return None  # the call was aborted

    async def HealthCheck(self, _: Any, __: Any) -> vllm.HealthCheckResponse:  # noqa: N802
        return vllm.HealthCheckResponse(healthy=True)

    async def Abort(  # noqa: N802
        self, request: vllm.AbortRequest, context: Any
    ) -> vllm.AbortResponse:
        async with aborting(context):
            if len(request.request_ids) > ABORTS_MAX:
                raise InvalidField("request_ids", f"has more than {ABORTS_MAX} entries")
            for each in request.request_ids:
                self._serving.models.cancel(each, tenant=self._serving.tenant(context))
        return vllm.AbortResponse()

    async def GetModelInfo(self, _: Any, __: Any) -> vllm.GetModelInfoResponse:  # noqa: N802
        session = self._serving.models.first
        return vllm.GetModelInfoResponse(
            model_path=session.model_name,
            is_generation=True,
            max_context_length=session.context_tokens,
            vocab_size=session.tokenizer.vocab_size,
            served_model_name=session.model_name,
            eos_token_ids=session.tokenizer.eos_token_ids,
            max_req_input_len=session.context_tokens - 1,
        )

    async def GetServerInfo(self, _: Any, __: Any) -> vllm.GetServerInfoResponse:  # noqa: N802
        return vllm.GetServerInfoResponse(
            uptime_seconds=(monotonic() - self._began_ns) / S,
            server_type="pdserve",
            data_parallel_size=1,
        )


class _Answers:
    """Chunks of a call as vLLM's messages. Counts are per choice."""

    def __init__(self, context: Any, *, streams: bool) -> None:
        self._context = context
        self._streams = streams
        self._complete: dict[int, vllm.GenerateComplete] = {}
        self._prompt = vllm.InputLogProbs()
        self._begun: set[int] = set()  # choices of which something was told

    async def tell(self, call: Call, chunk: pb.GenerateChunk) -> None:
        if chunk.prompt_logprobs:
            _add_prompt(self._prompt, chunk)
            return
        whole = self._complete.setdefault(
            chunk.choice, vllm.GenerateComplete(prompt_tokens=len(call.prompt), index=chunk.choice)
        )
        logprobs = _logprobs(chunk)
        whole.output_ids.extend(chunk.token_ids)
        whole.completion_tokens += len(chunk.token_ids)
        whole.output_logprobs.MergeFrom(logprobs)
        if self._streams and chunk.token_ids:
            part = vllm.GenerateStreamChunk(
                token_ids=chunk.token_ids,
                prompt_tokens=whole.prompt_tokens,
                completion_tokens=whole.completion_tokens,
                index=chunk.choice,
            )
            if chunk.logprobs:
                part.output_logprobs.CopyFrom(logprobs)
            if isinstance(call.task, Scoring) and chunk.choice not in self._begun:
                self._begun.add(chunk.choice)
                part.input_logprobs.CopyFrom(self._whole_prompt(call))
            await self._context.write(vllm.GenerateResponse(chunk=part))
        if chunk.finish_reason in _FINISH:
            whole.finish_reason = _FINISH[chunk.finish_reason]
            whole.cached_tokens = chunk.timing.cached_tokens
            match chunk.WhichOneof("stop_reason"):
                case "stop_string":
                    whole.matched_stop_str = chunk.stop_string
                case "stop_token_id":
                    whole.matched_token_id = chunk.stop_token_id
            if call.sampling.logprobs is None:
                whole.ClearField("output_logprobs")
            if isinstance(call.task, Scoring):
                whole.input_logprobs.CopyFrom(self._whole_prompt(call))
            await self._context.write(vllm.GenerateResponse(complete=whole))

    def _whole_prompt(self, call: Call) -> vllm.InputLogProbs:
        """Its first token has neither a value nor others in its place."""
        whole = vllm.InputLogProbs(
            token_logprobs=[vllm.InputTokenLogProb()],
            token_ids=call.prompt[:1],
            top_logprobs=[vllm.TopLogProbs()],
        )
        whole.MergeFrom(self._prompt)
        return whole


def _add_prompt(known: vllm.InputLogProbs, chunk: pb.GenerateChunk) -> None:
    for each in chunk.prompt_logprobs:
        known.token_logprobs.append(vllm.InputTokenLogProb(value=each.logprob))
        known.token_ids.append(each.token_id)
        known.top_logprobs.append(
            vllm.TopLogProbs(
                values=[top.logprob for top in each.top],
                token_ids=[top.token_id for top in each.top],
            )
        )


def _logprobs(chunk: pb.GenerateChunk) -> vllm.OutputLogProbs:
    return vllm.OutputLogProbs(
        token_logprobs=[each.logprob for each in chunk.logprobs],
        token_ids=[each.token_id for each in chunk.logprobs],
        top_logprobs=[
            vllm.TopLogProbs(
                values=[top.logprob for top in each.top],
                token_ids=[top.token_id for top in each.top],
            )
            for each in chunk.logprobs
        ],
    )
