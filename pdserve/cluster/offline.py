"""A cluster as an object of a Python program: prompts in, answers out.

    from pdserve import LLM, SamplingParams

    with LLM("model.gguf", settings={"decode.replicas": 2}) as llm:
        for answer in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
            print(answer.outputs[0].text)

The same workers, router and store as behind ``pdserve serve``, reached over gRPC on this machine;
``LLM(address="host:50051")`` uses a cluster that runs already. Answers come in the prompts' order,
whatever order they are computed in.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc

from pdserve.cluster.http_client import KEY_VARIABLE
from pdserve.cluster.local import local_cluster
from pdserve.errors import ConfigError, PdserveError
from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.proto.v1.inference_pb2_grpc import InferenceStub
from pdserve.settings import load

IN_FLIGHT_MAX = 64
"""Prompts that are under way at once; the cluster's queue is bounded."""

Prompt = str | Sequence[int]
Message = Mapping[str, str]

_FINISH = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "cancelled",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to draw, and when to end. Names and defaults are those of the gRPC ``Parameters``; None
    means the default stated there."""

    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | None = None
    regex: str | None = None

    def message(self) -> pb.Parameters:
        said: dict[str, Any] = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("json_schema", "regex") and getattr(self, name) is not None
        }
        if self.json_schema is not None and self.regex is not None:
            raise ConfigError("json_schema and regex: an answer follows one of them; leave one out")
        if self.json_schema is not None:
            said["constraint"] = pb.Constraint(json=json.dumps(self.json_schema))
        elif self.regex is not None:
            said["constraint"] = pb.Constraint(regex=self.regex)
        return pb.Parameters(**said)


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of one token in one place; ``rank`` counts from 1."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One choice."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class RequestOutput:
    """What came of one prompt."""

    prompt: Prompt | Sequence[Message]
    outputs: list[CompletionOutput]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """For each token of the prompt, by id: its own and the best in its place, where that was asked
    for. The first has none."""


class LLM:
    """
    Args:
        model: as for ``pdserve serve``: a directory, a GGUF file, a hub id; None: SmolLM2.
        settings: of the configuration, such as ``{"decode.replicas": 2}``.
        address: ``host:port`` of a gateway's gRPC port; model and settings are its own then.

    Raises:
        ConfigError: a setting cannot be used, or the cluster does not start.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        address: str | None = None,
        timeout_s: float = 3600.0,
    ) -> None:
        if address is not None and (model is not None or settings):
            raise ConfigError(
                "address: that cluster has a model and settings of its own; drop them"
            )
        self._timeout_s = timeout_s
        with contextlib.ExitStack() as stack:
            if address is None:
                wanted = {"gateway.http_port": 0, "gateway.grpc_port": 0, **(settings or {})}
                if model is not None:
                    wanted["model.source"] = model
                given = [f"{name}={json.dumps(value)}" for name, value in wanted.items()]
                cluster = stack.enter_context(local_cluster(load(None, assignments=given)))
                address = cluster.grpc
            channel = stack.enter_context(grpc.insecure_channel(address))
            self._stub = InferenceStub(channel)  # type: ignore[no-untyped-call]
            self._stack = stack.pop_all()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Continue each prompt, text or token ids.

        Raises:
            PdserveError: the first that was refused or failed; the others are given up.
        """
        given = [prompts] if _is_one(prompts) else list(prompts)
        wanted = sampling or SamplingParams()
        parameters = wanted.message()

        def start(prompt: Prompt) -> Iterator[pb.GenerateChunk]:
            request = pb.GenerateRequest(parameters=parameters)
            if isinstance(prompt, str):
                request.text = prompt
            else:
                request.token_ids.ids.extend(prompt)
            return self._call(self._stub.Generate, request)

        return self._all(given, start, scored=wanted.prompt_logprobs is not None)

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | None = None,
    ) -> list[RequestOutput]:
        """Answer each conversation; ``generate``'s errors."""
        one = bool(conversations) and isinstance(conversations[0], Mapping)
        given: list[Any] = [conversations] if one else list(conversations)
        wanted = sampling or SamplingParams()
        parameters = wanted.message()

        def start(messages: Sequence[Message]) -> Iterator[pb.GenerateChunk]:
            told = [pb.ChatMessage(**message) for message in messages]
            request = pb.ChatRequest(messages=told, parameters=parameters)
            return self._call(self._stub.Chat, request)

        return self._all(given, start, scored=wanted.prompt_logprobs is not None)

    def close(self) -> None:
        """End the cluster, if it is ours. Idempotent."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, method: Any, request: Any) -> Iterator[pb.GenerateChunk]:
        key = os.environ.get(KEY_VARIABLE)
        metadata = () if key is None else (("authorization", f"Bearer {key}"),)
        chunks: Iterator[pb.GenerateChunk] = method(
            request, timeout=self._timeout_s, metadata=metadata, wait_for_ready=True
        )
        return chunks

    def _all(
        self,
        given: Iterable[Any],
        start: Callable[[Any], Iterator[pb.GenerateChunk]],
        *,
        scored: bool,
    ) -> list[RequestOutput]:
        calls: list[Any] = []

        def gather(prompt: Any) -> RequestOutput:
            call = start(prompt)
            calls.append(call)
            return _gathered(prompt, call, scored=scored)

        with ThreadPoolExecutor(IN_FLIGHT_MAX, thread_name_prefix="llm") as pool:
            asked = [pool.submit(gather, prompt) for prompt in given]
            try:
                return [each.result() for each in asked]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for call in calls:
                    call.cancel()
                raise


def _is_one(prompts: Any) -> bool:
    return isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))


def _gathered(prompt: Any, chunks: Iterator[pb.GenerateChunk], *, scored: bool) -> RequestOutput:
    outputs: dict[int, CompletionOutput] = {}
    scores: list[dict[int, Logprob] | None] = [None]
    answer = RequestOutput(prompt, [], prompt_logprobs=scores if scored else None)
    try:
        for chunk in chunks:
            scores += map(_scores, chunk.prompt_logprobs)
            output = outputs.setdefault(chunk.choice, CompletionOutput(chunk.choice))
            output.text += chunk.text
            output.token_ids += chunk.token_ids
            if chunk.finish_reason != pb.FINISH_REASON_UNSPECIFIED:
                output.finish_reason = _FINISH.get(chunk.finish_reason)
                reason = chunk.WhichOneof("stop_reason")
                output.stop_reason = None if reason is None else getattr(chunk, reason)
            if chunk.HasField("usage"):
                answer.prompt_tokens = chunk.usage.prompt_tokens
                answer.cached_tokens = chunk.usage.cached_tokens
    except grpc.RpcError as error:
        raise PdserveError(str(error.details())) from error
    answer.outputs = [outputs[index] for index in sorted(outputs)]
    return answer


def _scores(told: pb.PromptLogprob) -> dict[int, Logprob]:
    """By token: its own first."""
    own = Logprob(told.logprob, told.rank, told.token)
    best = {
        top.token_id: Logprob(top.logprob, rank, top.token) for rank, top in enumerate(told.top, 1)
    }
    return {told.token_id: own} | best | {told.token_id: own}
