"""The service itself: runs calls and writes their pieces as chunks.

A typed error ends the call with its status, and trailing metadata says what the HTTP front says in
headers and body.
"""

from typing import Any

from pdserve.cluster.gateway.calls import Call
from pdserve.cluster.http.resuming import Trail
from pdserve.cluster.rpc.aborting import aborting
from pdserve.cluster.rpc.requests import chat_call, generate_call
from pdserve.cluster.rpc.resuming import LAST_METADATA, resumable
from pdserve.cluster.rpc.serving import Ask, Serving, text_metadata
from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.proto.v1.inference_pb2_grpc import InferenceServicer


class Servicer(InferenceServicer):
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:  # noqa: N802
        ask = self._serving.asking(generate_call, request, context, request.model)
        await self._serve("generate", ask, context, request)

    async def Chat(self, request: pb.ChatRequest, context: Any) -> None:  # noqa: N802
        ask = self._serving.asking(chat_call, request, context, request.model)
        await self._serve("chat", ask, context, request)

    async def Cancel(  # noqa: N802
        self, request: pb.CancelRequest, context: Any
    ) -> pb.CancelResponse:
        was_running = self._serving.models.cancel(request.id, tenant=self._serving.tenant(context))
        return pb.CancelResponse(was_running=was_running)

    async def ListModels(  # noqa: N802
        self, _: pb.ListModelsRequest, __: Any
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(
            models=[
                pb.Model(id=name, context_tokens=session.context_tokens, parent=parent)
                for session in self._serving.models
                for name, parent in (
                    (session.model_name, ""),
                    *((adapter, session.model_name) for adapter in session.adapters),
                )
            ]
        )

    async def _serve(
        self,
        operation: str,
        ask: Ask,
        context: Any,
        request: pb.GenerateRequest | pb.ChatRequest,
    ) -> None:
        async def tell(_: Call, chunk: pb.GenerateChunk) -> None:
            await context.write(chunk)

        def trail_of(call: Call) -> tuple[Call, Trail | None]:
            session, metadata = self._serving.models.of(call.model), text_metadata(context)
            call, trail = resumable(call, request, metadata, session.identity)
            if LAST_METADATA in metadata:  # this gateway may not know yet that its client is gone
                session.cancel(call.call, tenant=call.tenant)
            return call, trail

        async with aborting(context):
            await self._serving.run(
                operation, ask, context, tell, why=request.why, trail_of=trail_of
            )
