"""A worker's own loop with streams that only decode, stepped by whoever measures it.

No store, no router, no thread: prompts come in as the router sends them, are computed here and stay
here; tokens go nowhere.
"""

import time

from pdserve.config import PoolConfig, StoreConfig
from pdserve.decode.streams import Streams
from pdserve.engine.loop import EngineLoop
from pdserve.engine.mover import Mover
from pdserve.engine.workplace import Workplace
from pdserve.errors import StoreUnavailable
from pdserve.ids import HostId, RequestId, WorkerId
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.keys import namespace_digest
from pdserve.messages import (
    Address,
    Dispatch,
    Request,
    Route,
    Sampling,
    ServiceClass,
    Stop,
    Timing,
)
from pdserve.model.runner import ModelRunner
from pdserve.prefill.prompts import Prompts
from pdserve.text.tokenizer import Tokenizer

WORKER = WorkerId("bench")
NOWHERE = Address(HostId("nowhere"), "", "")
GREEDY = Sampling(temperature=0.0)
NAMESPACE = namespace_digest(model="bench")


class NoText(Tokenizer):
    """For requests that nobody reads: no token ends one, and none has a meaning. It does without
    the library ``tokenizers``, which a machine with torch alone lacks."""

    def __init__(self) -> None:
        self.vocab_size = 0
        self.eos_token_ids = ()
        self.bos_token_id = None
        self.chat_template = None
        self.special_ids = frozenset()

    def token_bytes(self, token: int) -> bytes:  # noqa: ARG002
        return b""

    def without_first_space(self, data: bytes) -> bytes:
        return data


def request(name: str, tokens: tuple[int, ...], *, max_tokens: int) -> Request:
    return Request(
        request=RequestId(name),
        attempt=0,
        choice=0,
        model="",
        tokens=tokens,
        prompt_tokens=len(tokens),
        block_keys=(),
        tenant="",
        service_class=ServiceClass.STANDARD,
        sampling=GREEDY,
        stop=Stop(max_tokens=max_tokens, ignore_eos=True),
        seed=0,
        deadline_unix_ms=0,
        reply_to=NOWHERE,
    )


class LoopUnderTest:
    def __init__(
        self,
        runner: ModelRunner,
        *,
        sequences: int,
        prompt_tokens: int,
        room_tokens: int,
        chunk_tokens: int,
        step_ahead: bool,
    ) -> None:
        """Returns when all prompts are computed and all streams run; each can take
        ``room_tokens``."""
        workplace = Workplace(
            worker=WORKER,
            runner=runner,
            mover=Mover(runner.pool, _no_store, NOWHERE, threaded=False),
            tokenizer=NoText(),
            namespace=NAMESPACE,
            store=StoreConfig(offload=False),
        )
        streams = Streams(workplace)
        settings = PoolConfig(
            running_max=sequences,
            chunk_tokens=chunk_tokens,
            mixed_chunk_tokens=chunk_tokens,
            step_ahead=step_ahead,
        )
        prompts = Prompts(workplace, keep=streams.keep)
        self._loop = EngineLoop(workplace, runner, settings, prompts=prompts, streams=streams)
        self._streams = streams
        self._counters = workplace.counters
        self._prompt_tokens = prompt_tokens
        route = Route(WORKER, WORKER, NOWHERE, NOWHERE)
        for index in range(sequences):
            # No two begin alike: a shared prefix would be computed once.
            tokens = tuple((index + at) % 199 + 1 for at in range(prompt_tokens))
            asked = request(f"r{index}", tokens, max_tokens=room_tokens)
            self._loop.handle(Dispatch(asked, route, Timing(), cached_tokens=0))
        while prompts.held:
            self._loop.step()

    @property
    def context_tokens(self) -> int:
        """Of the longest stream."""
        return self._prompt_tokens + max(one.generated_tokens for one in self._streams.attained())

    def step_s(self, count: int) -> float:
        """By the clock, one of ``count`` steps: from having the tokens of one to having those of
        the last."""
        began_s, until = time.perf_counter(), self._counters["steps"] + count
        while self._counters["steps"] < until:
            self._loop.step()
        return (time.perf_counter() - began_s) / count


def _no_store(_: Address) -> StoreClient:
    raise StoreUnavailable("there is no store here: nothing is offloaded or handed on")
