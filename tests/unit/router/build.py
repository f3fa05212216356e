"""Requests, workers and events with the numbers that tests do not care about filled in.

Rates are 1,000 tokens per second unless a test says otherwise: a token is a millisecond. Blocks
hold 16 tokens.
"""

from dataclasses import replace
from hashlib import blake2b

from pdserve.ids import BlockKey, HostId, RequestId, StoreId, TicketId, WorkerId
from pdserve.lifecycle import Event
from pdserve.messages import (
    Address,
    Cancel,
    ChunkDone,
    Dispatch,
    Goodbye,
    Handoff,
    Hello,
    Lost,
    Preempt,
    Progress,
    Refused,
    Report,
    Request,
    Resume,
    Role,
    Route,
    Sampling,
    ServiceClass,
    Stop,
    Timing,
)
from pdserve.router.core import Command, RouterCore, ToGateway, ToWorker
from pdserve.router_config import RouterConfig

BLOCK_TOKENS = 16
FAR_MS = 10**9
NOW = 0


def settings(
    *,
    prefill_tokens_per_s: int = 1000,
    waiting_max: int = 1024,
    preemption: bool = True,
    worker_silence_ms: int = FAR_MS,
) -> RouterConfig:
    return RouterConfig(
        prefill_tokens_per_s=prefill_tokens_per_s,
        waiting_max=waiting_max,
        preemption=preemption,
        gamma_per_s=0.12,
        level_count=8,
        worker_silence_ms=worker_silence_ms,
    )


def address(name: str, host: str = "h0") -> Address:
    return Address(HostId(host), f"/{name}", "")


def keys(name: str, count: int) -> tuple[BlockKey, ...]:
    """The keys of the first blocks of the document ``name``."""
    return tuple(
        BlockKey(blake2b(f"{name}/{index}".encode(), digest_size=16).digest())
        for index in range(count)
    )


def request(
    name: str,
    tokens: int,
    *,
    document: str | None = None,
    prompt_tokens: int | None = None,
    attempt: int = 0,
    max_tokens: int = 64,
    deadline_ms: int = FAR_MS,
    gateway: str = "g0",
    tenant: str = "",
    service_class: str = ServiceClass.STANDARD,
) -> Request:
    """``document`` is what its blocks' keys are of; by default its own."""
    return Request(
        request=RequestId(name),
        attempt=attempt,
        choice=0,
        model="m",
        tokens=tuple(range(tokens)),
        prompt_tokens=tokens if prompt_tokens is None else prompt_tokens,
        block_keys=keys(document or name, tokens // BLOCK_TOKENS),
        tenant=tenant,
        service_class=ServiceClass(service_class),
        sampling=Sampling(),
        stop=Stop(max_tokens=max_tokens),
        seed=0,
        deadline_unix_ms=deadline_ms,
        reply_to=address(gateway),
    )


def hello(
    name: str,
    *,
    host: str = "h0",
    chunk_tokens: int = 128,
    block_count: int = 1000,
    running_max: int = 64,
    disk: bool = False,
    fetches: bool = False,
) -> Hello:
    """A worker called p… prefills, one called d… decodes."""
    return Hello(
        worker=WorkerId(name),
        role=Role.PREFILL if name.startswith("p") else Role.DECODE,
        address=address(name, host),
        store_id=StoreId(f"store-{host}"),
        store=address("store", host),
        namespace="00",
        block_tokens=BLOCK_TOKENS,
        block_count=block_count,
        running_max=running_max,
        chunk_tokens=chunk_tokens,
        pid=1,
        store_has_disk=disk,
        fetches=fetches,
    )


class Reporter:
    """Says one worker's reports; remembers what the last one said of its load."""

    def __init__(self, core: RouterCore, said: Hello) -> None:
        self._core = core
        self.hello = said
        self._last = Report(said.worker, -1, False, 0, 0, said.block_count)

    def report(
        self,
        *,
        now_ns: int = NOW,
        draining: bool | None = None,
        running: int | None = None,
        waiting: int | None = None,
        free_blocks: int | None = None,
        progress: tuple[Progress, ...] = (),
        chunks: tuple[ChunkDone, ...] = (),
        blocks_added: tuple[BlockKey, ...] = (),
        blocks_removed: tuple[BlockKey, ...] = (),
        store_added: tuple[BlockKey, ...] = (),
        store_removed: tuple[BlockKey, ...] = (),
        store_anew: bool = False,
        lost_before: int = 0,
    ) -> list[Command]:
        last = self._last
        self._last = replace(
            last,
            sequence=last.sequence + 1 + lost_before,
            draining=last.draining if draining is None else draining,
            running=last.running if running is None else running,
            waiting=last.waiting if waiting is None else waiting,
            free_blocks=last.free_blocks if free_blocks is None else free_blocks,
        )
        said = replace(
            self._last,
            progress=progress,
            chunks=chunks,
            blocks_added=blocks_added,
            blocks_removed=blocks_removed,
            store_added=store_added,
            store_removed=store_removed,
            store_anew=store_anew,
        )
        return self._core.on_report(said, now_ns)

    def event(
        self, of: Request, event: Event, *, computed_tokens: int = 0, now_ns: int = NOW
    ) -> list[Command]:
        progress = Progress(of.request, of.attempt, event, computed_tokens)
        return self.report(progress=(progress,), now_ns=now_ns)

    def chunk(
        self, of: Request, computed_tokens: int, elapsed_ms: int, *, now_ns: int = NOW
    ) -> list[Command]:
        chunk = ChunkDone(of.request, of.attempt, computed_tokens, elapsed_ms * 1000)
        return self.report(chunks=(chunk,), now_ns=now_ns)


def add(core: RouterCore, said: Hello, *, now_ns: int = NOW) -> Reporter:
    core.on_hello(said, now_ns)
    return Reporter(core, said)


def handoff(of: Request, by: Hello, *, tokens: int | None = None) -> Handoff:
    """What decode says when it parks: the prompt and so many tokens in all."""
    count = len(of.tokens) + 1 if tokens is None else tokens
    return Handoff(
        request=of,
        route=Route(WorkerId("p0"), by.worker, by.address, by.store),
        ticket=TicketId(f"t-{of.request}"),
        store=by.store,
        tokens=tuple(range(count)),
        block_keys=keys(of.request, (count - 1) // BLOCK_TOKENS),
        unsent=(),
        timing=Timing(),
    )


def told(commands: list[Command]) -> list[str]:
    """Commands as text, one line each."""
    return [_line(command) for command in commands]


def _line(command: Command) -> str:  # noqa: PLR0911
    match command:
        case ToWorker(worker, Dispatch(request, route, timing, _, other)):
            ahead = f", ahead of {other}" if other else ""
            again = f", preempted {timing.preempted_count}" if timing.preempted_count else ""
            return (
                f"{worker} <- dispatch {request.request}, decode {route.decode}, "
                f"level {timing.level}, queued {timing.queued_us // 1000} ms{again}{ahead}"
            )
        case ToWorker(worker, Preempt(request, _, _)):
            return f"{worker} <- preempt {request}"
        case ToWorker(worker, Cancel(request, attempt)):
            return f"{worker} <- cancel {request}/{attempt}"
        case ToWorker(worker, Resume(handoff)):
            return f"{worker} <- resume {handoff.request.request}, decode {handoff.route.decode}"
        case ToWorker(worker, Goodbye(_)):
            return f"{worker} <- goodbye"
        case ToGateway(gateway, Refused(request, attempt, error)):
            retry = f" (retry after {error.retry_after_ms} ms)" if error.retry_after_ms else ""
            return f"{gateway.unix_path[1:]} <- refused {request}/{attempt}: {error.message}{retry}"
        case ToGateway(gateway, Lost(request, attempt, worker)):
            return f"{gateway.unix_path[1:]} <- lost {request}/{attempt} with {worker}"
    raise AssertionError(f"no such command: {command}")


def core_with(
    *hellos: Hello, config: RouterConfig | None = None
) -> tuple[RouterCore, list[Reporter]]:
    """A core whose wall time is its monotonic time, and its workers."""
    core = RouterCore(config or settings(), unix_zero_ms=0)
    return core, [add(core, said) for said in hellos]
