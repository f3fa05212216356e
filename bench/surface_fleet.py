"""Workers whose compute is a timed wait: sockets, frames and the protocol are the real ones.

One process plays any number of workers. A request brings its pace along, as its seed: how long its
prompt takes, and how long each step. All streams of one pace move together, as a batch does, and a
step's tokens for one gateway go in as few frames as a real worker's would. A step waits until the
tokens of the one before have arrived: whoever cannot take more sets the pace, and nothing piles up.

Steps end at whole multiples of their length on the machine's monotonic clock, which all processes
read. So whoever receives a token knows how long it was under way, without being told.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from pdserve.cluster.worker_shell import in_batches
from pdserve.ids import HostId, RequestId, StoreId, WorkerId
from pdserve.lifecycle import Event
from pdserve.messages import (
    Address,
    Cancel,
    Dispatch,
    FinishReason,
    Goodbye,
    Hello,
    Progress,
    Report,
    Request,
    Role,
    Timing,
    Token,
    TokenBatch,
    TokenDelta,
)
from pdserve.wire.connection import Connection, connect
from pdserve.wire.postbox import Postbox

BLOCK_TOKENS = 16
BLOCK_COUNT = 1 << 26
RUNNING_MAX = 1 << 20
CHUNK_TOKENS = 1 << 16

REPORT_S = 0.5
"""Each worker reports so often when nothing happens, as real ones do."""

REPORT_SHARES = 10
"""Not all of them at once."""

OUTBOX_MAX = 4096

TOKENS = tuple(Token(token) for token in range(1000, 1064))
"""What they say over and over: in the default model's vocabulary each is a text of its own."""

US_PER_S = 1_000_000
_STEP_BITS = 31


@dataclass(frozen=True, slots=True)
class Pace:
    """What a request's compute takes."""

    prefill_us: int
    step_us: int  # 0: nothing follows the first token

    def as_seed(self) -> int:
        assert 0 <= self.prefill_us < 1 << _STEP_BITS
        assert 0 <= self.step_us < 1 << _STEP_BITS
        return self.prefill_us << _STEP_BITS | self.step_us

    @staticmethod
    def of_seed(seed: int) -> "Pace":
        return Pace(seed >> _STEP_BITS, seed & ((1 << _STEP_BITS) - 1))


def next_end_us(now_us: int, step_us: int) -> int:
    """When the step that begins now is over: at the next multiple, a whole step from now at most,
    and never at this very moment."""
    return (now_us // step_us + 1) * step_us


@dataclass(slots=True)
class Talk:
    """One request's stream of tokens. Pure."""

    request: Request
    timing: Timing
    decode: "MockWorker"
    said: int = 0
    is_cancelled: bool = False

    @property
    def is_over(self) -> bool:
        return self.is_cancelled or self.said == self.request.stop.max_tokens

    def say(self) -> TokenDelta:
        """The next token."""
        assert not self.is_over
        offset = self.request.emitted_count + self.said
        self.said += 1
        return TokenDelta(
            self.request.request,
            self.request.attempt,
            offset,
            (TOKENS[offset % len(TOKENS)],),
            finish=FinishReason.LENGTH if self.is_over else None,
            timing=self.timing if self.said == 1 or self.is_over else None,
        )


class MockWorker:
    """One connection to the router; what happens in one turn of the event loop is one report."""

    def __init__(self, role: Role, index: int, fleet: "Fleet") -> None:
        self.id = WorkerId(f"{role}-{index}")
        self.role = role
        self._fleet = fleet
        self._sequence = 0
        self._running = 0
        self._progress: list[Progress] = []
        self._is_due = False
        self._outbox: asyncio.Queue[Report] = asyncio.Queue(OUTBOX_MAX)
        self._connection: Connection

    async def join(self, router: Address, host: HostId) -> None:
        self._connection = await connect(router, host=host)
        nowhere = Address(host, "/nowhere", "")
        await self._connection.send(
            Hello(
                worker=self.id,
                role=self.role,
                address=nowhere,
                store_id=StoreId("store"),
                store=nowhere,
                namespace="00",
                block_tokens=BLOCK_TOKENS,
                block_count=BLOCK_COUNT,
                running_max=RUNNING_MAX,
                chunk_tokens=CHUNK_TOKENS,
                pid=0,
            )
        )
        self.report()

    async def listen(self) -> None:
        while True:
            match (await self._connection.receive()).message:
                case Dispatch() as dispatch:
                    self._fleet.take(dispatch, self)
                case Cancel(request):
                    self._fleet.cancel(request)
                case Goodbye():
                    return

    async def pump(self) -> None:
        while True:
            await self._connection.send(await self._outbox.get())

    def note(self, talk: Talk, event: Event, *, running: int) -> None:
        """``running``: what it means for the sequences here."""
        request = talk.request
        self._running += running
        total_tokens = request.length + talk.said
        self._progress.append(
            Progress(request.request, request.attempt, event, request.length, total_tokens)
        )
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self.report)

    def start(self) -> None:
        self._running += 1

    def stop(self) -> None:
        """One that was cancelled: the router asked for it, and needs no event."""
        self._running -= 1

    def report(self) -> None:
        self._is_due = False
        progress, self._progress = tuple(self._progress), []
        self._outbox.put_nowait(
            Report(self.id, self._sequence, False, self._running, 0, BLOCK_COUNT, progress)
        )
        self._sequence += 1

    async def leave(self) -> None:
        await self._connection.close()


@dataclass(slots=True)
class _Batch:
    """All streams of one pace."""

    talks: dict[RequestId, Talk] = field(default_factory=dict)


class Fleet:
    """Lives on one event loop."""

    def __init__(self, host: HostId, *, report_s: float = REPORT_S) -> None:
        self._host = host
        self._report_s = report_s
        self._postbox = Postbox(host=host)
        self._workers: dict[WorkerId, MockWorker] = {}
        self._talks: dict[RequestId, Talk] = {}
        self._batches: dict[int, _Batch] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def join(self, router: Address, *, prefills: int, decodes: int) -> None:
        """So many workers of each kind come."""
        create = asyncio.get_running_loop().create_task
        for role, count in ((Role.PREFILL, prefills), (Role.DECODE, decodes)):
            for index in range(count):
                worker = MockWorker(role, index, self)
                await worker.join(router, self._host)
                self._workers[worker.id] = worker
                self._tasks += [create(worker.listen()), create(worker.pump())]
        self._tasks.append(create(self._report_regularly()))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self._workers.values():
            await worker.leave()
        await self._postbox.close()

    def take(self, dispatch: Dispatch, prefill: MockWorker) -> None:
        request = dispatch.request
        talk = Talk(request, dispatch.timing, self._workers[dispatch.route.decode])
        self._talks[request.request] = talk
        pace = Pace.of_seed(request.seed)
        prefill.start()
        asyncio.get_running_loop().call_later(
            pace.prefill_us / US_PER_S, self._prefilled, talk, prefill, pace
        )

    def cancel(self, request: RequestId) -> None:
        """Both of its workers are told; the first one's word counts."""
        talk = self._talks.pop(request, None)
        if talk is None:
            return
        talk.is_cancelled = True
        if talk.said:
            talk.decode.stop()

    def _prefilled(self, talk: Talk, prefill: MockWorker, pace: Pace) -> None:
        if talk.is_cancelled:
            prefill.stop()
            return
        prefill.note(talk, Event.PREFILL_DONE, running=-1)
        talk.decode.note(talk, Event.ADOPTED, running=1)
        self._tell([talk])
        if talk.is_over or not pace.step_us:
            return
        batch = self._batches.get(pace.step_us)
        if batch is None:
            batch = self._batches[pace.step_us] = _Batch()
            self._tasks.append(asyncio.create_task(self._step_on(pace.step_us, batch)))
        batch.talks[talk.request.request] = talk

    async def _step_on(self, step_us: int, batch: _Batch) -> None:
        end_us = 0
        while True:
            # A step that is late is not made up for: the next one ends a whole step later.
            end_us = next_end_us(max(end_us, time.monotonic_ns() // 1000), step_us)
            while (left_us := end_us - time.monotonic_ns() // 1000) > 0:
                await asyncio.sleep(left_us / US_PER_S)
            await self._postbox.flush()
            for request in [r for r, talk in batch.talks.items() if talk.is_over]:
                del batch.talks[request]
            self._tell(list(batch.talks.values()))

    def _tell(self, talks: list[Talk]) -> None:
        """A token of each."""
        deltas: dict[tuple[WorkerId, Address], list[TokenDelta]] = defaultdict(list)
        for talk in talks:
            deltas[talk.decode.id, talk.request.reply_to].append(talk.say())
            if talk.is_over:
                self._talks.pop(talk.request.request, None)
                talk.decode.note(talk, Event.ENDED, running=-1)
        for (worker, address), some in deltas.items():
            for part in in_batches(some):
                self._postbox.post(address, TokenBatch(worker, part))

    async def _report_regularly(self) -> None:
        for share in _forever(REPORT_SHARES):
            await asyncio.sleep(self._report_s / REPORT_SHARES)
            for worker in list(self._workers.values())[share::REPORT_SHARES]:
                worker.report()


def _forever(count: int) -> Iterator[int]:
    while True:
        yield from range(count)
