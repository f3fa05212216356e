"""KServe's inference protocol over the same calls, for clients of Triton and KServe."""

import asyncio
from importlib.metadata import version
from typing import Any

from pdserve.cluster.gateway.calls import Call
from pdserve.cluster.gateway.parameters import check_model
from pdserve.cluster.rpc.aborting import aborting
from pdserve.cluster.rpc.kserve_requests import (
    FINAL,
    FINISH_NAMES,
    FINISH_REASON,
    SAMPLING,
    TEXT,
    TEXT_OUTPUT,
    TOKENS,
    Wanted,
    empty_response,
    response_of,
    wanted_of,
)
from pdserve.cluster.rpc.requests import generate_call
from pdserve.cluster.rpc.serving import Serving
from pdserve.errors import InvalidField, PdserveError
from pdserve.proto.kserve import inference_pb2 as kserve
from pdserve.proto.kserve.inference_pb2_grpc import GRPCInferenceServiceServicer
from pdserve.proto.v1 import inference_pb2 as pb

SERVICE = kserve.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
PLATFORM = "pdserve"
VERSION = "1"

STREAM_REQUESTS_MAX = 64
"""Requests of one stream that are answered side by side; it is read on when one of them ends."""

_INPUTS = (
    (TEXT, "BYTES", kserve.TYPE_STRING),
    (TOKENS, "INT32", kserve.TYPE_INT32),
    ("stream", "BOOL", kserve.TYPE_BOOL),
    (SAMPLING, "BYTES", kserve.TYPE_STRING),
)
_OUTPUTS = (
    (TEXT_OUTPUT, "BYTES", kserve.TYPE_STRING),
    (FINISH_REASON, "BYTES", kserve.TYPE_STRING),
)


class KserveServicer(GRPCInferenceServiceServicer):
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def ServerLive(self, _: Any, __: Any) -> kserve.ServerLiveResponse:  # noqa: N802
        return kserve.ServerLiveResponse(live=True)

    async def ServerReady(self, _: Any, __: Any) -> kserve.ServerReadyResponse:  # noqa: N802
        return kserve.ServerReadyResponse(ready=True)

    async def ModelReady(  # noqa: N802
        self, request: kserve.ModelReadyRequest, _: Any
    ) -> kserve.ModelReadyResponse:
        try:
            self._check(request.name, request.version)
        except PdserveError:
            return kserve.ModelReadyResponse(ready=False)
        return kserve.ModelReadyResponse(ready=True)

    async def ServerMetadata(self, _: Any, __: Any) -> kserve.ServerMetadataResponse:  # noqa: N802
        return kserve.ServerMetadataResponse(name=PLATFORM, version=version("pdserve"))

    async def ModelMetadata(  # noqa: N802
        self, request: kserve.ModelMetadataRequest, context: Any
    ) -> kserve.ModelMetadataResponse:
        async with aborting(context):
            name = self._check(request.name, request.version)
        tensor = kserve.ModelMetadataResponse.TensorMetadata
        return kserve.ModelMetadataResponse(
            name=name,
            versions=[VERSION],
            platform=PLATFORM,
            inputs=[
                tensor(name=each, datatype=datatype, shape=[-1 if each == TOKENS else 1])
                for each, datatype, _ in _INPUTS
            ],
            outputs=[
                tensor(name=each, datatype=datatype, shape=[-1]) for each, datatype, _ in _OUTPUTS
            ],
        )

    async def ModelConfig(  # noqa: N802
        self, request: kserve.ModelConfigRequest, context: Any
    ) -> kserve.ModelConfigResponse:
        async with aborting(context):
            name = self._check(request.name, request.version)
        config = kserve.ModelConfig(name=name, platform=PLATFORM, backend=PLATFORM)
        for each, _, kind in _INPUTS:
            dims = [-1 if each == TOKENS else 1]
            config.input.add(name=each, data_type=kind, dims=dims, optional=True)
        for each, _, kind in _OUTPUTS:
            config.output.add(name=each, data_type=kind, dims=[-1])
        config.model_transaction_policy.decoupled = True
        return kserve.ModelConfigResponse(config=config)

    async def ModelInfer(  # noqa: N802
        self, request: kserve.ModelInferRequest, context: Any
    ) -> kserve.ModelInferResponse:
        async with aborting(context):
            wanted = self._wanted(request)
            if wanted.streams:
                raise InvalidField("stream", "is true; that takes ModelStreamInfer")
            return await self._whole(request, wanted, context)
        raise AssertionError("it was aborted")

    async def ModelStreamInfer(self, requests: Any, context: Any) -> None:  # noqa: N802
        room = asyncio.Semaphore(STREAM_REQUESTS_MAX)
        writing = asyncio.Lock()

        async def tell(response: kserve.ModelStreamInferResponse) -> None:
            async with writing:
                await context.write(response)

        async def answer(request: kserve.ModelInferRequest) -> None:
            try:
                await self._streamed(request, context, tell)
            except PdserveError as error:
                failed = kserve.ModelStreamInferResponse(error_message=str(error))
                failed.infer_response.id = request.id
                await tell(failed)
            finally:
                room.release()

        async with asyncio.TaskGroup() as answers:
            async for request in requests:
                await room.acquire()
                answers.create_task(answer(request))

    async def _streamed(self, request: kserve.ModelInferRequest, context: Any, tell: Any) -> None:
        wanted = self._wanted(request)
        model = self._serving.models.first.model_name

        async def tell_response(response: kserve.ModelInferResponse, *, last: bool) -> None:
            if wanted.final:
                response.parameters[FINAL].bool_param = last
            await tell(kserve.ModelStreamInferResponse(infer_response=response))

        async def tell_chunk(_: Call, chunk: pb.GenerateChunk) -> None:
            finish = FINISH_NAMES[chunk.finish_reason]
            if chunk.text or finish:
                response = response_of(request, model, wanted, [chunk.text], [finish])
                response.parameters["choice"].int64_param = chunk.choice
                await tell_response(response, last=False)

        if wanted.streams:
            await self._serving.run(
                "kserve", self._ask(wanted, context), context, tell_chunk, counts=True
            )
        else:
            whole = await self._whole(request, wanted, context, counts=True)
            await tell_response(whole, last=False)
        if wanted.final:
            await tell_response(empty_response(request, model), last=True)

    async def _whole(
        self,
        request: kserve.ModelInferRequest,
        wanted: Wanted,
        context: Any,
        *,
        counts: bool = False,
    ) -> kserve.ModelInferResponse:
        texts: dict[int, str] = {}
        finishes: dict[int, str] = {}

        async def keep(_: Call, chunk: pb.GenerateChunk) -> None:
            texts[chunk.choice] = texts.get(chunk.choice, "") + chunk.text
            finishes[chunk.choice] = FINISH_NAMES[chunk.finish_reason]

        await self._serving.run("kserve", self._ask(wanted, context), context, keep, counts=counts)
        order = sorted(texts)
        return response_of(
            request,
            self._serving.models.first.model_name,
            wanted,
            [texts[choice] for choice in order],
            [finishes[choice] for choice in order],
        )

    def _ask(self, wanted: Wanted, context: Any) -> Any:
        return self._serving.asking(generate_call, wanted.request, context, wanted.request.model)

    def _wanted(self, request: kserve.ModelInferRequest) -> Wanted:
        self._check(request.model_name, request.model_version)
        return wanted_of(request)

    def _check(self, name: str, wanted_version: str) -> str:
        """The name of a model that is served. UnknownModel, InvalidField."""
        session = self._serving.models.of(name)
        if wanted_version not in ("", VERSION):
            raise InvalidField("model_version", f"must be {VERSION} or empty: there is no other")
        return check_model(name, session) or session.model_name
