"""gRPC clients that ask for streams again and again: each a connection of its own, which it keeps.

Their answers are put together and compared as :mod:`tests.faults.load` does for HTTP. No stream is
resumed here: a gateway that leaves on purpose ends what it has begun, and what it refuses instead
is for gRPC's own policy to send again.
"""

import threading
from collections.abc import Sequence
from typing import Any, cast

import grpc

from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.proto.v1.inference_pb2_grpc import InferenceStub
from tests.faults.load import COMPLETION, END_S, Answer, Ask
from tests.grpc_channels import own_connection

DEADLINE_S = 120.0
PLAIN = ("temperature", "top_p", "seed", "max_tokens", "min_tokens", "ignore_eos", "n", "stop")
"""Of a completion's parameters, those that gRPC has under the same name."""


def speakable(asks: Sequence[Ask]) -> list[Ask]:
    """Those of ``asks`` that need no more than the plain parameters."""
    known = {"prompt", "stream", "return_token_ids", *PLAIN}
    return [ask for ask in asks if ask.path == COMPLETION and ask.body.keys() <= known]


def _request(ask: Ask) -> pb.GenerateRequest:
    parameters = pb.Parameters(**{name: ask.body[name] for name in PLAIN if name in ask.body})
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=ask.body["prompt"]), parameters=parameters)


def _answer(stub: Any, ask: Ask) -> Answer:
    answer = Answer()
    try:
        for chunk in stub.Generate(_request(ask), timeout=DEADLINE_S):
            choice = answer.of_choice(chunk.choice)
            choice["text"] += chunk.text
            choice["tokens"] += chunk.token_ids
            if chunk.finish_reason:
                choice["finish"] = pb.FinishReason.Name(chunk.finish_reason)
    except grpc.RpcError as error:
        answer.error = f"{cast(Any, error).code().name}: {cast(Any, error).details()}"
    return answer


class GrpcEndless:
    """``clients`` threads, each of which asks for all of ``asks`` in turn, once at least."""

    def __init__(self, port: int, asks: Sequence[Ask], *, clients: int) -> None:
        self.answers: list[list[Answer]] = [[] for _ in range(clients)]
        """Of each client, ``asks`` round after round."""
        self._target = f"127.0.0.1:{port}"
        self._asks = asks
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(answers,)) for answers in self.answers
        ]

    def _run(self, answers: list[Answer]) -> None:
        options = own_connection(retries=True)
        with grpc.insecure_channel(self._target, options=options) as channel:
            stub = cast(Any, InferenceStub)(channel)
            while not (answers and self._stop.is_set()):
                answers += [_answer(stub, ask) for ask in self._asks]

    def __enter__(self) -> "GrpcEndless":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(END_S)
            assert not thread.is_alive()
