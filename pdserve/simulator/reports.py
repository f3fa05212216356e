"""What a worker tells the router, in the live worker's own messages."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from pdserve.clock import S
from pdserve.errors import ErrorInfo, OutOfBlocks
from pdserve.ids import TicketId
from pdserve.lifecycle import Event
from pdserve.messages import (
    Attained,
    ChunkDone,
    Handoff,
    Hello,
    Parked,
    Progress,
    Report,
    Route,
    Timing,
    WorkerFailed,
)
from pdserve.simulator.attempt import Attempt
from pdserve.simulator.batch import Batch
from pdserve.simulator.caches import BlockCache, Blocks
from pdserve.simulator.traces import some_tokens

REPORT_NS_MAX: Final = S
"""A worker that does anything reports at least so often, as live ones do."""

RETRY_AFTER_MS: Final = 100

_NEVER: Final = 1 << 62
_NO_COUNTERS: Mapping[str, int] = MappingProxyType({})


class Said:
    """What one moment gives the router to know."""

    __slots__ = ("chunks", "progress")

    def __init__(self) -> None:
        self.progress: list[Progress] = []
        self.chunks: list[ChunkDone] = []

    def note(self, attempt: Attempt, event: Event, computed_tokens: int = 0) -> None:
        request = attempt.request
        self.progress.append(
            Progress(request.request, request.attempt, event, computed_tokens, attempt.tokens)
        )

    def note_chunks(self, head: Attempt, *, now_ns: int) -> None:
        """Since its last report: all chunks but the last as one, then the last by itself, whose
        time is a measurement."""
        id_, number = head.request.request, head.request.attempt
        began_ns = max(head.chunk_ns, head.reported_ns)
        done = head.cached_tokens + head.computed_tokens
        if began_ns > head.reported_ns:
            merged_us = max(1, (began_ns - head.reported_ns) // 1000)
            before_last = head.cached_tokens + head.chunk_tokens
            self.chunks.append(ChunkDone(id_, number, before_last, merged_us))
        self.chunks.append(ChunkDone(id_, number, done, max(1, (now_ns - began_ns) // 1000)))
        head.reported_tokens, head.reported_ns = head.computed_tokens, now_ns

    def note_all(self, head: Attempt, *, now_ns: int) -> None:
        """All its chunks since its last report, as one."""
        request, done = head.request, head.cached_tokens + head.computed_tokens
        elapsed_us = max(1, (now_ns - head.reported_ns) // 1000)
        self.chunks.append(ChunkDone(request.request, request.attempt, done, elapsed_us))
        head.reported_tokens, head.reported_ns = head.computed_tokens, now_ns


class Reporter:
    """Numbers a worker's reports, and adds what came and went since the last one."""

    __slots__ = ("_attained_due_ns", "_cache", "_sequence", "_store", "_worker", "reported_ns")

    def __init__(
        self,
        hello: Hello,
        cache: BlockCache | None,
        store: BlockCache | None,
        *,
        tells_attained: bool,
    ) -> None:
        """``cache``, ``store``: None where its blocks are of no use to a prefill."""
        self.reported_ns = 0
        self._worker = hello.worker
        self._cache = cache
        self._store = store
        self._sequence = 0
        self._attained_due_ns = 0 if tells_attained else _NEVER

    def report(
        self,
        now_ns: int,
        said: Said,
        batch: Batch,
        *,
        draining: bool,
        running: int,
        waiting: int,
        free_blocks: int,
    ) -> Report:
        nothing: Blocks = ()
        cache, store = self._cache, self._store
        added, removed = (nothing, nothing) if cache is None else cache.take_changes()
        stored, evicted = (nothing, nothing) if store is None else store.take_changes()
        report = Report(
            self._worker,
            self._sequence,
            draining,
            running,
            waiting,
            free_blocks,
            tuple(said.progress),
            tuple(said.chunks),
            self._attained(batch, now_ns) if now_ns >= self._attained_due_ns else (),
            added,
            removed,
            stored,
            evicted,
            _NO_COUNTERS,
        )
        self._sequence += 1
        self.reported_ns = now_ns
        return report

    def _attained(self, batch: Batch, now_ns: int) -> tuple[Attained, ...]:
        self._attained_due_ns = now_ns + REPORT_NS_MAX
        steps = batch.steps
        attained = []
        for stream in batch:
            request = stream.request
            generated_tokens = stream.base_tokens + steps - request.prompt_tokens
            attained.append(Attained(request.request, request.attempt, generated_tokens))
        return tuple(attained)


def parked(hello: Hello, attempt: Attempt) -> Parked:
    """Its blocks are in the store of this host."""
    request = attempt.request
    return Parked(
        Handoff(
            request=request,
            route=Route(attempt.prefill, hello.worker, hello.address, hello.store),
            ticket=TicketId(f"t-{request.request}-{request.attempt}"),
            store=hello.store,
            tokens=some_tokens(attempt.tokens),
            block_keys=request.block_keys,
            unsent=(),
            timing=Timing(parked_count=attempt.job.parked_count),
        )
    )


def out_of_blocks(attempt: Attempt, wanted: int, block_count: int) -> WorkerFailed:
    """It would not fit, were it alone."""
    error = OutOfBlocks(wanted, block_count, retry_after_ms=RETRY_AFTER_MS)
    request = attempt.request
    return WorkerFailed(request.request, request.attempt, ErrorInfo.of(error))
