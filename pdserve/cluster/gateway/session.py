"""The gateway's middle: calls in from the fronts, requests out to the router, tokens back.

    front ──Call──► session ──Submit──► router … decode ──TokenBatch──► session ──Piece──► front

One choice is one request, but for a beam search, which is one request for all its choices. The
first choice goes ahead alone; when its first token is back, its prompt's blocks are in the store,
and the others follow and find them there. So n choices cost one prefill, on any number of prefill
workers.

A lost worker, a router that came back, a broken hand-off: all end in the same place, `_again`,
which submits the prompt and what was delivered as the next attempt. Recovery is admission.

What is asked of the prompt itself goes first, as a request of its own (``prompt_tasks``). One that
scores the prompt leaves its blocks cached, so that the choices after it compute its end alone.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path

from pdserve.clock import steady_unix_ms
from pdserve.cluster.gateway.calls import Call, Piece
from pdserve.cluster.gateway.delivery import BeamDelivery, Delivery
from pdserve.cluster.gateway.gaps import GapWatch
from pdserve.cluster.gateway.pinning import Pinning
from pdserve.cluster.gateway.poison import Suspicion
from pdserve.cluster.gateway.prompt_delivery import PromptDelivery, with_task
from pdserve.cluster.gateway.turns import Turns
from pdserve.cluster.link import RouterLink
from pdserve.errors import (
    CapacityError,
    DeadlineExceeded,
    PdserveError,
    PoisonRequest,
    PromptTooLong,
    QueueFull,
)
from pdserve.ids import BlockKey, HostId, RequestId, new_request_id
from pdserve.kvstore.keys import adapter_namespace, block_keys
from pdserve.kvstore.security import Credentials
from pdserve.messages import (
    Address,
    Cancel,
    FinishReason,
    GatewayHello,
    Lost,
    Refused,
    Request,
    Sampling,
    Stop,
    Submit,
    TokenBatch,
    TokenDelta,
)
from pdserve.prompt_tasks import Pooling, PromptDelta, Scoring
from pdserve.text.chat import ChatTemplate, chat_template_of
from pdserve.text.detokenizer import Detokenizer
from pdserve.text.grammar import Grammars
from pdserve.text.tokenizer import Tokenizer
from pdserve.wire.connection import Connection
from pdserve.wire.hearing import hear_all
from pdserve.wire.listener import Listener

log = logging.getLogger(__name__)

AnyDelivery = Delivery | BeamDelivery | PromptDelivery

DEADLINE_GRACE_S = 1.0
"""The router answers an expired request itself; this long after, the session stops waiting."""

BURST_MAX = 256
"""Pieces at once: what a client that was slow gets in one write."""

LOST_AGAIN_S = 0.25
"""Before the third attempt, and twice as long before each further one: what broke two in a row may
need a moment to be noticed. All attempts at once would be used up by one broken worker."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a gateway must know of the model that the workers run."""

    name: str
    context_tokens: int
    namespace: bytes
    block_tokens: int
    streams_max: int
    adapters: Mapping[str, str] = field(default_factory=dict)  # name → digest


@dataclass(slots=True)
class _Running:
    """A call under way. The queue is bounded by the tokens its choices may generate."""

    call: Call
    seed: int
    pieces: asyncio.Queue[Piece | PdserveError] = field(default_factory=asyncio.Queue)
    requests: dict[RequestId, AnyDelivery] = field(default_factory=dict)
    suspicions: dict[RequestId, Suspicion] = field(default_factory=dict)  # who was in a death
    task: PromptDelivery | None = None  # what is asked of the prompt, which the choices wait for
    started_count: int = 0
    is_pinned: bool = False  # the stores will be told to keep its prompt


class GatewaySession:
    """Implements ``cluster.calls.Session``; lives on one event loop."""

    def __init__(self, served: Served, tokenizer: Tokenizer, *, host: HostId) -> None:
        self.model_name = served.name
        self.identity = served.namespace.hex()
        self.adapters: Collection[str] = served.adapters
        self.context_tokens = served.context_tokens
        self.tokenizer = tokenizer
        self.template: ChatTemplate = chat_template_of(tokenizer)
        self.grammars = Grammars(tokenizer)
        self.pinning: Pinning | None = None
        """Tells the stores which prompts to keep, where somebody runs it."""

        self._served = served
        self._host = host
        self._calls: dict[str, _Running] = {}
        self._by_request: dict[RequestId, _Running] = {}
        self._gaps = GapWatch(lambda request: self._find(request)[1], self._again)
        self._turns = Turns(self._on_delta)
        self._listener: Listener | None = None
        self._link: RouterLink | None = None

    async def start(
        self,
        directory: Path,
        find_router: Callable[[], Awaitable[Address]],
        *,
        tcp_host: str | None,
        timeout_s: float = 30.0,
        silence_s: float = 3.0,
        credentials: Credentials | None = None,
    ) -> None:
        """``credentials``: for traffic with other hosts; None: TCP is plain."""
        credentials = credentials or Credentials()
        self._listener = await Listener.open(
            directory,
            f"gw-{secrets.token_hex(4)}",
            host=self._host,
            serve=self._listen,
            tcp_host=tcp_host,
            ssl_context=credentials.ssl_context(server_side=True),
        )
        self._link = RouterLink(
            self,
            find_router=find_router,
            host=self._host,
            silence_s=silence_s,
            tls=credentials.ssl_context(server_side=False),
        )
        await self._link.start(timeout_s=timeout_s)

    async def close(self) -> None:
        for call in list(self._calls):
            self.cancel(call)
        if self._link is not None:
            await self._link.close()
        if self._listener is not None:
            await self._listener.close()

    @property
    def in_flight(self) -> int:
        return len(self._by_request)

    @property
    def has_router(self) -> bool:
        return self._link is not None and self._link.connected

    def end_all(self, error: PdserveError) -> None:
        for running in self._calls.values():
            running.pieces.put_nowait(error)

    # ── the fronts' side ─────────────────────────────────────────────────────────────────────────

    async def generate(self, call: Call) -> AsyncIterator[Piece]:
        async with aclosing(self.bursts(call)) as bursts:
            async for pieces in bursts:
                for piece in pieces:
                    yield piece

    async def bursts(self, call: Call) -> AsyncGenerator[Sequence[Piece]]:
        self._check(call)
        running = _Running(call, secrets.randbits(63) if call.seed is None else call.seed)
        self._calls[call.call] = running
        expiry = _expire_in_time(running)
        try:
            (self._begin_choices if call.task is None else self._begin_task)(running)
            open_count = call.n
            while open_count:
                pieces, error = await _ready(running)
                if pieces:
                    self._pin_once(running)
                    has_begun = any(not piece.scores for piece in pieces)
                    if has_begun and 0 < running.started_count < call.request_count:
                        self._begin(running, call.request_count)
                    open_count -= sum(piece.finish is not None for piece in pieces)
                    yield [with_task(piece, running.task) for piece in pieces]
                    if len(pieces) == BURST_MAX:  # the next one may be there already
                        await asyncio.sleep(0)
                if error is not None and open_count:
                    raise error
        finally:
            expiry.cancel()
            self._forget(running)

    def _pin_once(self, running: _Running) -> None:
        """With the first piece, when the prompt's blocks are stored."""
        call = running.call
        if call.pin_ms is not None and self.pinning is not None and not running.is_pinned:
            running.is_pinned = True
            keys = self.block_keys(call.prompt, call.tenant, call.adapter)
            self.pinning.keep(keys, call.pin_ms)

    def cancel(self, call: str, *, tenant: str | None = None) -> bool:
        running = self._calls.get(call)
        if running is None or tenant not in (None, running.call.tenant):
            return False
        started = running.started_count
        waiting = range(started, running.call.request_count) if started else range(running.call.n)
        open_choices = [choice for d in running.requests.values() for choice in d.open_choices]
        self._forget(running)
        running.started_count = running.call.request_count
        for choice in [*open_choices, *waiting]:
            running.pieces.put_nowait(Piece(choice, "", (), FinishReason.CANCELLED))
        return True

    def _check(self, call: Call) -> None:
        # One token must have room, but not where nothing is generated.
        if len(call.prompt) > self.context_tokens - (not isinstance(call.task, Pooling)):
            raise PromptTooLong(len(call.prompt), self.context_tokens, field=call.prompt_field)
        if len(self._by_request) + call.n > self._served.streams_max:
            raise QueueFull(
                f"this gateway has {len(self._by_request)} streams open, at most "
                f"{self._served.streams_max} are allowed",
                retry_after_ms=1000,
            )
        if call.call in self._calls:
            raise CapacityError(f"a call {call.call} is running already", retry_after_ms=1000)

    def _begin_task(self, running: _Running) -> None:
        """Submits what is asked of the prompt."""
        call = running.call
        assert call.task is not None
        task = call.task
        if isinstance(task, Scoring) and task.first >= task.end(len(call.prompt)):
            self._begin_choices(running)  # the first token has no score
            return
        request = replace(
            self._request(running, 0),
            task=call.task,
            sampling=Sampling(),
            stop=Stop(max_tokens=1),
            beams=None,
        )
        if call.task.reads_all:  # cached blocks are of no use to it, and the router should know
            request = replace(request, block_keys=())
        running.task = running.requests[request.request] = PromptDelivery(request)
        self._by_request[request.request] = running
        self._post(Submit(request))

    def _begin_choices(self, running: _Running) -> None:
        """The first one; where none has any token, all of them end here."""
        call = running.call
        if call.stop.max_tokens:
            self._begin(running, 1)
            return
        running.started_count = call.request_count
        timing = running.task.timing if running.task else None
        for choice in range(call.n):
            end = Piece(choice, "", (), FinishReason.LENGTH, timing=timing)
            running.pieces.put_nowait(end)

    def _begin(self, running: _Running, count: int) -> None:
        """Submits requests until ``count`` of the call have begun."""
        call = running.call
        for choice in range(running.started_count, count):
            request = self._request(running, choice)
            detokenizer = Detokenizer(
                self.tokenizer,
                prompt=call.prompt,
                skip_special_tokens=call.skip_special_tokens,
            )
            deliver = Delivery if call.beams is None else BeamDelivery
            running.requests[request.request] = deliver(
                request, detokenizer, include_stop_string=call.include_stop_string
            )
            self._by_request[request.request] = running
            self._post(Submit(request))
        running.started_count = count

    def _request(self, running: _Running, choice: int) -> Request:
        call = running.call
        adapter = "" if call.adapter is None else self._served.adapters[call.adapter]
        room_tokens = self.context_tokens - len(call.prompt)
        stop = call.stop
        if stop.max_tokens > room_tokens:
            stop = replace(stop, max_tokens=room_tokens)
        return Request(
            request=new_request_id(),
            attempt=0,
            choice=choice,
            model=call.adapter or self.model_name,
            tokens=call.prompt,
            prompt_tokens=len(call.prompt),
            block_keys=self._keys(call.prompt, call.tenant, adapter),
            tenant=call.tenant,
            service_class=call.service_class,
            sampling=call.sampling,
            stop=stop,
            seed=running.seed,
            deadline_unix_ms=call.deadline_unix_ms,
            reply_to=self._address(),
            adapter=adapter,
            beams=call.beams,
            retries=call.retries,
        )

    def _forget(self, running: _Running) -> None:
        if self._calls.get(running.call.call) is running:  # not one that goes on under its name
            del self._calls[running.call.call]
        for request, delivery in running.requests.items():
            if self._by_request.pop(request, None) is not None and not delivery.finished:
                self._post(Cancel(request))

    # ── the router's side ────────────────────────────────────────────────────────────────────────

    def hello(self) -> GatewayHello:
        return GatewayHello(self._address())

    def hear(self, message: object) -> None:
        match message:
            case Refused(request, attempt, error):
                running, delivery = self._find(request)
                if running and delivery and delivery.request.attempt == attempt:
                    self._end(running, delivery, error.to_error())
            case Lost(request, attempt, worker) as lost:
                running, delivery = self._find(request)
                if running and delivery and delivery.request.attempt == attempt:
                    if lost.implicated and self._is_poison(running, delivery, lost):
                        return
                    log.info("%s lost worker %s, attempt %d follows", request, worker, attempt + 1)
                    delay_s = LOST_AGAIN_S * 2 ** (attempt - 1) if attempt else 0.0
                    asyncio.get_running_loop().call_later(
                        delay_s, self._again_if_still, request, attempt
                    )
            case _:
                log.warning("the router sent a %s, which no gateway expects", type(message))

    def _is_poison(self, running: _Running, delivery: AnyDelivery, lost: Lost) -> bool:
        """Whether workers die of it; then its client is told, and nobody computes it again."""
        suspicion = running.suspicions.setdefault(lost.request, Suspicion())
        suspicion.implicated(len(delivery.tokens_so_far()))
        delivery.request = replace(delivery.request, deaths=suspicion.deaths)
        if not suspicion.is_guilty(alone=lost.alone):
            return False
        call = running.call.call
        log.error("%s (%s) kills workers, the last was %s", call, lost.request, lost.worker)
        self._end(running, delivery, PoisonRequest(call, suspicion.deaths))
        return True

    def reconnected(self) -> None:
        """A router that came back knows nothing of what runs: everything is a next attempt."""
        for running in list(self._calls.values()):
            for delivery in running.requests.values():
                if not delivery.finished:
                    self._again(delivery)

    def _again_if_still(self, request: RequestId, attempt: int) -> None:
        _, delivery = self._find(request)
        if delivery and not delivery.finished and delivery.request.attempt == attempt:
            self._again(delivery)

    def _again(self, delivery: AnyDelivery) -> None:
        request, tokens = delivery.request, delivery.tokens_so_far()
        keys = self._keys(tokens, request.tenant, request.adapter)
        try:
            self._post(Submit(delivery.next_attempt(keys)))
        except PdserveError as error:
            running, _ = self._find(request.request)
            if running is not None:
                self._end(running, delivery, error)

    # ── the workers' side ────────────────────────────────────────────────────────────────────────

    async def _listen(self, connection: Connection) -> None:
        with contextlib.suppress(PdserveError):
            await hear_all(connection, self._on_message)

    def _on_message(self, message: object) -> None:
        match message:
            case TokenBatch(_, deltas):
                self._turns.add(deltas)
            case PromptDelta() as known:
                self._on_delta(known)
            case other:
                log.warning("a worker sent a %s, which no gateway expects", type(other))

    def _on_delta(self, delta: TokenDelta | PromptDelta) -> None:
        running, delivery = self._find(delta.request)
        if running is None or delivery is None:
            return
        try:
            for piece in _pieces(delivery, delta):
                running.pieces.put_nowait(piece)
        except PdserveError as error:
            self._end(running, delivery, error)
        else:
            self._gaps.look(delta.request, delivery)
            if delivery.finished:
                self._by_request.pop(delta.request, None)
                if delivery is running.task and not isinstance(running.call.task, Pooling):
                    self._begin_choices(running)

    def _find(self, request: RequestId) -> tuple[_Running | None, AnyDelivery | None]:
        running = self._by_request.get(request)
        return running, running.requests.get(request) if running else None

    def _end(self, running: _Running, delivery: AnyDelivery, error: PdserveError) -> None:
        delivery.finished = True
        self._by_request.pop(delivery.request.request, None)
        running.pieces.put_nowait(error)

    # ── small things ─────────────────────────────────────────────────────────────────────────────

    def block_keys(
        self, tokens: Sequence[int], tenant: str, adapter: str | None
    ) -> tuple[BlockKey, ...]:
        digest = "" if adapter is None else self._served.adapters[adapter]
        return self._keys(tuple(tokens), tenant, digest)

    def know_blocks_as(self, identity: str) -> None:
        """From now on keys are those of the workers' blocks by this digest, in hexadecimal."""
        self._served = replace(self._served, namespace=bytes.fromhex(identity))
        self.identity = identity

    def _keys(self, tokens: tuple[int, ...], tenant: str, adapter: str) -> tuple[BlockKey, ...]:
        namespace = adapter_namespace(self._served.namespace, adapter)
        return block_keys(namespace, tokens, self._served.block_tokens, tenant=tenant)

    def _address(self) -> Address:
        assert self._listener is not None, "start() comes first"
        return self._listener.address

    def _post(self, message: object) -> None:
        assert self._link is not None, "start() comes first"
        self._link.post_now(message)


def _pieces(delivery: AnyDelivery, delta: TokenDelta | PromptDelta) -> list[Piece]:
    if isinstance(delta, TokenDelta):
        return delivery.on_delta(delta)
    return delivery.on_prompt(delta) if isinstance(delivery, PromptDelivery) else []


async def _ready(running: _Running) -> tuple[list[Piece], PdserveError | None]:
    """What is ready, after waiting for the first of it: ``BURST_MAX`` pieces at most; and what the
    call has failed with behind them, if it has."""
    queue = running.pieces
    pieces: list[Piece] = []
    said = await queue.get()
    while not isinstance(said, PdserveError):
        pieces.append(said)
        if queue.empty() or len(pieces) == BURST_MAX:
            return pieces, None
        said = queue.get_nowait()
    return pieces, said


def _expire_in_time(running: _Running) -> asyncio.TimerHandle:
    """The call ends with an error if the router has not said so itself a while after its deadline.

    One timer per call, and none per piece: this stands on every token's way.
    """
    call = running.call
    error = DeadlineExceeded(
        f"{call.call} was not finished within its deadline; ask for fewer tokens or allow more time"
    )
    left_s = (call.deadline_unix_ms - steady_unix_ms()) / 1000 + DEADLINE_GRACE_S
    loop = asyncio.get_running_loop()
    return loop.call_later(max(left_s, 0), running.pieces.put_nowait, error)
