"""Prefill, decode and mixed workers on fake models and fake stores, and the wires between them."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from pdserve.clock import Clock, monotonic
from pdserve.cluster.worker_parts import make_loop
from pdserve.config import PoolConfig, StoreConfig
from pdserve.engine.loop import EngineLoop
from pdserve.engine.mover import Mover
from pdserve.engine.moves import Move
from pdserve.engine.outputs import OfPrompt, Output, ToDecode, ToGateway, ToRouter
from pdserve.engine.restorer import Remote
from pdserve.ids import RequestId, WorkerId
from pdserve.kvstore.keys import adapter_namespace, block_keys, namespace_digest
from pdserve.messages import (
    Address,
    Dispatch,
    FinishReason,
    Handoff,
    Parked,
    Progress,
    Request,
    Resume,
    Route,
    Sampling,
    ServiceClass,
    Stop,
    Timing,
    TokenDelta,
)
from pdserve.model.sampler import SamplerRow, sample
from pdserve.prompt_tasks import PromptDelta
from tests.unit.engine.fakes import (
    ADAPTERS,
    BLOCK_TOKENS,
    EOS,
    FakeRunner,
    FakeStore,
    address,
    entry,
    letters,
    logits_of,
)

NAMESPACE = namespace_digest(model="fake")
GATEWAY = address("gateway")
STEPS_MAX = 2000
OFFERS_MAX = 2
GREEDY = Sampling(temperature=0.0)
SAMPLINGS = {
    "greedy": GREEDY,
    "seeded": Sampling(temperature=1.3, top_p=0.9, top_k=20),
    "penalties": Sampling(
        temperature=0.8, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.5
    ),
}
TENANT = "acme"
TOKENIZER = letters()


def prompt(length: int, *, salt: int = 0) -> tuple[int, ...]:
    return tuple((7 * i + i * i + 11 * salt + salt * i) % EOS for i in range(length))


def request(
    name: str = "r",
    tokens: Sequence[int] = prompt(10),
    *,
    sampling: Sampling = GREEDY,
    max_tokens: int = 12,
    ignore_eos: bool = True,
    min_tokens: int = 0,
    stop: tuple[str, ...] = (),
    stop_token_ids: tuple[int, ...] = (),
    choice: int = 0,
    attempt: int = 0,
    prompt_tokens: int | None = None,
    adapter: str = "",
) -> Request:
    return Request(
        request=RequestId(name),
        attempt=attempt,
        choice=choice,
        model="fake-adapter" if adapter else "fake",
        tokens=tuple(tokens),
        prompt_tokens=len(tokens) if prompt_tokens is None else prompt_tokens,
        block_keys=block_keys(
            adapter_namespace(NAMESPACE, adapter), tokens, BLOCK_TOKENS, tenant=TENANT
        ),
        tenant=TENANT,
        service_class=ServiceClass.STANDARD,
        sampling=sampling,
        stop=Stop(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            token_ids=stop_token_ids,
            strings=stop,
        ),
        seed=1234,
        deadline_unix_ms=0,
        reply_to=GATEWAY,
        adapter=adapter,
    )


def plain(asked: Request, *, habit: float = 0.0) -> tuple[int, ...]:
    """What a single loop without blocks, chunks or hand-offs generates, up to the token limit."""
    tokens = list(asked.tokens)
    while len(tokens) < asked.prompt_tokens + asked.stop.max_tokens:
        kv = b"".join(
            entry(token, position, asked.adapter) for position, token in enumerate(tokens)
        )
        index = len(tokens) - asked.prompt_tokens
        row = SamplerRow(
            asked.sampling, asked.seed, asked.choice, index, tokens, asked.prompt_tokens
        )
        tokens.append(
            sample(torch.from_numpy(np.stack([logits_of(kv, habit=habit)])), [row])[0].token
        )
    return tuple(tokens[asked.prompt_tokens :])


class LateMover(Mover):
    """Runs moves when told to, in the order that the thread would."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self.late: deque[tuple[Move, Any]] = deque()
        self.offers: deque[tuple[Move, Any]] = deque()
        super().__init__(*args, **keywords)

    def submit(self, move: Move, owner: Any = None) -> None:
        self.late.append((move, owner))

    def offer(self, move: Move, owner: Any = None) -> bool:
        if len(self.offers) >= OFFERS_MAX:
            return False
        self.offers.append((move, owner))
        return True

    def take_back_offered(self) -> list[Move]:
        moves = [move for move, _ in self.offers]
        self.offers.clear()
        return moves

    def run_one(self) -> bool:
        queue = self.late or self.offers
        if not queue:
            return False
        super().submit(*queue.popleft())
        return True


class Rig:
    """Prefill workers on host ``p``, decode workers on host ``d``, each host with a store."""

    def __init__(
        self,
        *,
        one_host: bool = False,
        offload: bool = True,
        habit: float = 0.0,
        speculation: Literal["off", "prompt_lookup"] = "off",
        step_ahead: bool = False,
        clock: Clock = monotonic,
        lacking: str = "",
        remote: Remote | None = None,
    ) -> None:
        """``lacking``: the name of a worker that has no adapters. ``remote``: what further hosts
        have."""
        self.remote = remote
        self.lacking = lacking
        self.habit = habit
        self.step_ahead = step_ahead
        self.speculation = speculation
        self.clock = clock
        self.p_store = FakeStore()
        self.d_store = self.p_store if one_host else FakeStore()
        self.p_address = address("d-store" if one_host else "p-store")
        self.d_address = address("d-store")
        self.stores: dict[Address, FakeStore] = {
            self.p_address: self.p_store,
            self.d_address: self.d_store,
        }
        self.store_config = StoreConfig(offload=offload)
        self.prefills: dict[str, EngineLoop] = {}
        self.decodes: dict[str, EngineLoop] = {}
        self.runners: dict[str, FakeRunner] = {}
        self.deltas: dict[RequestId, list[TokenDelta]] = {}
        self.known: dict[RequestId, list[PromptDelta]] = {}
        self.to_router: list[object] = []
        self.parked: list[Handoff] = []
        self.resume_on: str | None = None  # parked requests go there at once

    def prefill(self, name: str = "p0", *, blocks: int = 64, chunk_tokens: int = 8) -> EngineLoop:
        settings = PoolConfig(
            chunk_tokens=chunk_tokens,
            mixed_chunk_tokens=BLOCK_TOKENS,
            speculation=self.speculation,
        )
        self.prefills[name] = self._make(name, self.p_address, blocks, settings)
        return self.prefills[name]

    def decode(
        self,
        name: str = "d0",
        *,
        blocks: int = 64,
        running_max: int = 64,
        chunk_tokens: int = 8,
        mixed_chunk_tokens: int = BLOCK_TOKENS,
    ) -> EngineLoop:
        settings = PoolConfig(
            running_max=running_max,
            chunk_tokens=chunk_tokens,
            mixed_chunk_tokens=mixed_chunk_tokens,
            speculation=self.speculation,
            step_ahead=self.step_ahead,
        )
        self.decodes[name] = self._make(name, self.d_address, blocks, settings)
        return self.decodes[name]

    def _make(self, name: str, local: Address, blocks: int, settings: PoolConfig) -> EngineLoop:
        adapters = () if name == self.lacking else ADAPTERS
        runner = self.runners[name] = FakeRunner(blocks, habit=self.habit, adapters=adapters)
        mover = Mover(
            runner.pool,
            lambda store: self.stores[store],
            local,
            remote=self.remote,
            threaded=False,
        )
        return make_loop(
            worker=WorkerId(name),
            runner=runner,
            mover=mover,
            tokenizer=TOKENIZER,
            namespace=NAMESPACE,
            settings=settings,
            store=self.store_config,
            clock=self.clock,
        )

    def dispatch(self, asked: Request, *, prefill: str = "p0", decode: str = "d0") -> Dispatch:
        route = Route(WorkerId(prefill), WorkerId(decode), address(decode), self.d_address)
        return Dispatch(asked, route, Timing())

    def send(self, asked: Request, *, prefill: str = "p0", decode: str = "d0") -> None:
        """``prefill`` may be a decode worker, and ``decode`` a prefill worker."""
        message = self.dispatch(asked, prefill=prefill, decode=decode)
        self.worker(prefill).handle(message)

    def worker(self, name: str) -> EngineLoop:
        return self.prefills[name] if name in self.prefills else self.decodes[name]

    def step(self, loop: EngineLoop) -> list[Output]:
        """One step of one loop, its outputs delivered."""
        outputs = loop.step()
        for output in outputs:
            match output:
                case ToDecode(where, handoff):
                    self.worker(where.host).handle(handoff)
                case ToGateway(where, delta):
                    assert where == GATEWAY
                    self.deltas.setdefault(delta.request, []).append(delta)
                case OfPrompt(where, known):
                    assert where == GATEWAY
                    self.known.setdefault(known.request, []).append(known)
                case ToRouter(Parked(handoff)):
                    self.parked.append(handoff)
                case ToRouter(message):
                    self.to_router.append(message)
        if self.resume_on is not None:
            while self.parked:
                self.resume(self.parked.pop(0), self.resume_on)
        return outputs

    def resume(self, handoff: Handoff, decode: str) -> None:
        route = replace(handoff.route, decode=WorkerId(decode), decode_address=address(decode))
        self.worker(decode).handle(Resume(replace(handoff, route=route)))

    def run_prefills(self) -> None:
        self._run([*self.prefills.values()])

    def run(self) -> None:
        """Step everybody in turn until nobody has anything to do."""
        self._run([*self.prefills.values(), *self.decodes.values()])

    def _run(self, loops: Sequence[EngineLoop]) -> None:
        for _ in range(STEPS_MAX):
            busy = [loop for loop in loops if loop.busy()]
            if not busy:
                return
            for loop in busy:
                self.step(loop)
        raise AssertionError(f"still busy after {STEPS_MAX} rounds")

    def tokens(self, name: str = "r") -> tuple[int, ...]:
        """What the gateway got, exactly once: no gap, no overlap."""
        got: list[int] = []
        for delta in self.deltas.get(RequestId(name), []):
            assert delta.offset == len(got), f"token {delta.offset} follows {len(got)} tokens"
            got += [token.token for token in delta.tokens]
        return tuple(got)

    def finish(self, name: str = "r") -> FinishReason | None:
        return self.deltas[RequestId(name)][-1].finish

    def events(self, name: str = "r") -> list[str]:
        return [
            message.event.value
            for message in self.to_router
            if isinstance(message, Progress) and message.request == name
        ]

    def told(self, kind: type) -> list[object]:
        return [message for message in self.to_router if isinstance(message, kind)]

    def check_idle(self) -> None:
        """Everything is back where it was before the first request."""
        for loop in (*self.prefills.values(), *self.decodes.values()):
            if not isinstance(loop, EngineLoop):
                continue  # a test's stand-in
            load = loop.load()
            assert (load.running, load.waiting) == (0, 0)
            loop.pool.check()
            assert loop.pool.free_count == loop.pool.block_count
        for store in self.stores.values():
            store.check_idle()
            assert store.tenants <= {TENANT}
