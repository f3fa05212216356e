"""A session without a cluster: yields what a script says, and remembers what it was asked.

A script is a function from a call to its steps: pieces, an error to raise, or ``HANG`` to wait
until somebody closes the iterator. Text is tokenised into its UTF-8 bytes.
"""

import asyncio
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from enum import Enum
from typing import Any, Literal, cast

import numpy as np

from pdserve.cluster.gateway.calls import Call, Piece
from pdserve.errors import PdserveError
from pdserve.ids import BlockKey, WorkerId
from pdserve.kvstore.keys import adapter_namespace, block_keys, namespace_digest
from pdserve.messages import FinishReason, Timing, Token, TokenLogprob
from pdserve.prompt_tasks import Pooling, PromptScore, Scoring
from pdserve.text.chat import ChatTemplate
from pdserve.text.grammar import Grammars
from pdserve.text.tokenizer import Tokenizer

MODEL = "fake-model"
VECTOR = np.array([0.5, -0.5, 0.1, 0.7], dtype="<f4")
ADAPTER = "fake-adapter"
VOCAB_SIZE = 257
EOS = 256

TIMING = Timing(
    queued_us=1500,
    prefill_us=20_000,
    handoff_us=700,
    cached_tokens=3,
    preempted_count=1,
    parked_count=2,
    level=4,
    prefill=WorkerId("prefill-1"),
    decode=WorkerId("decode-1"),
)


class Wait(Enum):
    HANG = 0


HANG = Wait.HANG

Step = Piece | PdserveError | Literal[Wait.HANG]
Script = Callable[[Call], Iterable[Step]]


BLOCK_TOKENS = 4
BURST_MAX = 64
NAMESPACE = namespace_digest(model=MODEL)


class FakeTokenizer:
    vocab_size = VOCAB_SIZE
    eos_token_ids = (EOS,)
    bos_token_id = None
    chat_template = None
    special_ids = frozenset({EOS})

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text = bytes(token for token in tokens if token != EOS).decode(errors="replace")
        return text if skip_special_tokens else text + "<eos>" * list(tokens).count(EOS)

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return b"<eos>" if token == EOS else bytes([token])


class FakeTemplate:
    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        told = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        prompt = f"{'tools ' * len(tools or ())}{told}{'assistant: ' * add_generation_prompt}"
        return prompt + "".join(f"{name}={value}" for name, value in (arguments or {}).items())


class FakeSession:
    """Same methods as ``Session``; mypy checks that where a front is given one."""

    model_name = MODEL
    identity = NAMESPACE.hex()
    context_tokens = 1000

    def __init__(self, script: Script | None = None, *, adapters: Collection[str] = ()) -> None:
        self.adapters = adapters
        self.tokenizer = cast(Tokenizer, FakeTokenizer())
        self.template = cast(ChatTemplate, FakeTemplate())
        self.grammars = Grammars(self.tokenizer)
        self.script: Script = script or said("Hello", " world")
        self.fails: PdserveError | None = None  # every call, whatever is asked
        self.calls: list[Call] = []
        self.cancelled: list[str] = []
        self.open: set[str] = set()
        self.has_router = False
        self._hanging: set[asyncio.Future[None]] = set()
        self.opened = threading.Event()
        self.closed = threading.Event()  # whenever no iterator is open any more

    @property
    def in_flight(self) -> int:
        return len(self.open)

    def end_all(self, error: PdserveError) -> None:
        """Every call that hangs fails."""
        while self._hanging:
            self._hanging.pop().set_exception(error)

    async def generate(self, call: Call) -> AsyncIterator[Piece]:
        async with aclosing(self.bursts(call)) as bursts:
            async for pieces in bursts:
                for each in pieces:
                    yield each

    async def bursts(self, call: Call) -> AsyncGenerator[Sequence[Piece]]:
        """Ready at once is what the script says before it waits, fails or ends."""
        self.calls.append(call)
        self.open.add(call.call)
        self.closed.clear()  # also where an earlier call's end was seen before it was noted here
        self.opened.set()
        ready: list[Piece] = []
        try:
            if self.fails is not None:
                raise self.fails
            for piece_ in of_the_prompt(call):
                yield [piece_]
            if call.stop.max_tokens == 0 or isinstance(call.task, Pooling):
                return
            for step in self.script(call):
                if isinstance(step, Piece):
                    ready.append(step)
                    if len(ready) < BURST_MAX:
                        continue
                if ready:
                    yield ready
                    ready = []
                    await asyncio.sleep(0)  # as between any two of a real session's
                if isinstance(step, PdserveError):
                    raise step
                if isinstance(step, Wait):
                    await self._hang()
            if ready:
                yield ready
        finally:
            self.open.discard(call.call)
            if not self.open:
                self.closed.set()

    def go_on(self) -> None:
        """Every call that hangs goes on with its script."""
        while self._hanging:
            self._hanging.pop().set_result(None)

    async def _hang(self) -> None:
        hanging = asyncio.get_running_loop().create_future()
        self._hanging.add(hanging)
        try:
            await hanging
        finally:
            self._hanging.discard(hanging)

    def block_keys(
        self, tokens: Sequence[int], tenant: str, adapter: str | None
    ) -> tuple[BlockKey, ...]:
        namespace = adapter_namespace(NAMESPACE, adapter or "")
        return block_keys(namespace, tokens, BLOCK_TOKENS, tenant=tenant)

    def cancel(self, call: str, *, tenant: str | None = None) -> bool:
        self.cancelled.append(call)
        return call in self.open


def of_the_prompt(call: Call) -> Iterator[Piece]:
    """Each token's score is -0.25 times its index, and its rank 2; of candidates the first is the
    likeliest, each next one by half a nat less."""
    match call.task:
        case Pooling():
            yield Piece(0, "", (), FinishReason.STOP, timing=TIMING, vector=VECTOR.tobytes())
        case Scoring(top=top, first=first, candidates=candidates):
            for index, token in enumerate(call.prompt[first:], first):
                best = tuple(
                    ((token - i) % VOCAB_SIZE, -0.25 * index - 0.5 * i) for i in range(top)
                )
                yield Piece(0, "", (), scores=(PromptScore(-0.25 * index, 2, best),))
            if candidates:
                behind = tuple((token, -0.5 * i) for i, token in enumerate(candidates, 1))
                yield Piece(0, "", (), scores=(PromptScore(-0.5, 1, behind),))
    if call.stop.max_tokens == 0:
        for choice in range(call.n):
            yield Piece(choice, "", (), FinishReason.LENGTH)


def piece(
    text: str,
    *,
    choice: int = 0,
    finish: FinishReason | None = None,
    stop_reason: str | int | None = None,
    logprobs: int | None = None,
) -> Piece:
    """A piece of one token per byte; each token's logprob is -0.5 and the best are as asked."""
    tokens = tuple(
        Token(
            byte,
            None
            if logprobs is None
            else TokenLogprob(-0.5, tuple((byte + i, -0.5 - i) for i in range(logprobs))),
        )
        for byte in text.encode()
    )
    return Piece(choice, text, tokens, finish, stop_reason, TIMING)


def said(*texts: str, finish: FinishReason = FinishReason.STOP) -> Script:
    """Every choice says ``texts``, interleaved; the last one with ``finish``."""

    def script(call: Call) -> Iterable[Step]:
        for text in texts[:-1]:
            for choice in range(call.n):
                yield piece(text, choice=choice, logprobs=call.sampling.logprobs)
        for choice in range(call.n):
            yield piece(texts[-1], choice=choice, finish=finish, logprobs=call.sampling.logprobs)

    return script


def steps(*given: Step) -> Script:
    return lambda _: given
