"""What the router knows of each worker: its own bookkeeping, corrected by the worker's reports.

A *held* request is one this router sent there and has not seen leave: at a prefill worker what it
computes or is about to, at a decode worker what runs there or is on its way. Reports trail behind
what was just sent, and know of work that a router before this one sent; so a worker is taken to be
as busy as the larger of the two numbers says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pdserve.clock import S
from pdserve.ids import RequestId, StoreId, WorkerId
from pdserve.messages import Address, Hello, Report, Role
from pdserve.router.placement import DecodeOption
from pdserve.router.prefix_index import PrefixIndex

HELD_MAX = 2
"""Late binding: what a prefill worker runs, and one more to begin with at once afterwards."""

RATE_PRIOR_TOKENS = 256
"""How many measured tokens outweigh the configured rate."""

RATE_MEMORY_TOKENS = 8192
"""Older measurements fade: about so many tokens are remembered."""


class PrefillRate:
    """Tokens per second of prefill: measured, starting from what was configured.

    A quotient of two sums, so that large chunks count for more than small ones.
    """

    def __init__(self, believed_tokens_per_s: int) -> None:
        assert believed_tokens_per_s > 0
        self._tokens = float(RATE_PRIOR_TOKENS)
        self._elapsed_s = RATE_PRIOR_TOKENS / believed_tokens_per_s

    def observe(self, tokens: int, elapsed_us: int) -> None:
        assert tokens > 0
        assert elapsed_us > 0
        fade = max(0.0, 1 - tokens / RATE_MEMORY_TOKENS)
        self._tokens = self._tokens * fade + tokens
        self._elapsed_s = self._elapsed_s * fade + elapsed_us / 1e6

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self._elapsed_s

    def work_ns(self, tokens: int) -> int:
        return round(tokens * self._elapsed_s / self._tokens * S)


@dataclass(slots=True)
class Worker:
    hello: Hello
    last_heard_ns: int
    rate: PrefillRate
    free_blocks: int
    next_sequence: int | None = None  # of its reports; None before the first
    draining: bool = False
    running: int = 0  # by its last report, as are the next two
    waiting: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)
    held: dict[RequestId, None] = field(default_factory=dict)  # in the order they were sent
    reserved_blocks: int = 0  # for those held that have not arrived yet

    @property
    def id(self) -> WorkerId:
        return self.hello.worker

    @property
    def busy_count(self) -> int:
        return max(len(self.held), self.running + self.waiting)

    @property
    def has_prefill_room(self) -> bool:
        return not self.draining and self.busy_count < HELD_MAX

    def chunk_ns(self) -> int:
        return self.rate.work_ns(self.hello.chunk_tokens)

    def decode_option(self) -> DecodeOption:
        free_blocks = self.free_blocks - self.reserved_blocks
        return DecodeOption(
            worker=self.id,
            free_blocks=free_blocks,
            used_blocks=self.hello.block_count - free_blocks,
            bound=self.busy_count,
            running_max=self.hello.running_max,
        )


class Fleet:
    """All workers, by id; and, through the index, where blocks are."""

    def __init__(self, *, believed_tokens_per_s: int) -> None:
        self._believed_tokens_per_s = believed_tokens_per_s
        self._workers: dict[WorkerId, Worker] = {}
        self.rate = PrefillRate(believed_tokens_per_s)  # of all prefill workers together
        self.index = PrefixIndex()

    def get(self, worker: WorkerId | None) -> Worker | None:
        return None if worker is None else self._workers.get(worker)

    def of(self, role: Role) -> list[Worker]:
        """In the order of their ids, so that replayed traces stay identical."""
        return [worker for _, worker in sorted(self._workers.items()) if worker.hello.role is role]

    def all(self) -> list[Worker]:
        return [worker for _, worker in sorted(self._workers.items())]

    def add(self, hello: Hello, now_ns: int) -> None:
        assert hello.worker not in self._workers, f"{hello.worker} is there already"
        self._workers[hello.worker] = Worker(
            hello=hello,
            last_heard_ns=now_ns,
            rate=PrefillRate(self._believed_tokens_per_s),
            free_blocks=hello.block_count,
        )

    def remove(self, worker: Worker) -> None:
        del self._workers[worker.id]
        self.index.forget(worker.id)
        if not self._has_store_id(worker.hello.store_id):
            self.index.forget(worker.hello.store_id)

    def apply(self, report: Report, worker: Worker) -> None:
        """Take over what a report says of the worker itself."""
        if worker.next_sequence not in (None, report.sequence):
            self.index.forget(worker.id)  # deltas were lost
        worker.next_sequence = report.sequence + 1
        worker.draining = report.draining
        worker.running, worker.waiting = report.running, report.waiting
        worker.free_blocks = report.free_blocks
        worker.counters = report.counters
        if worker.hello.role is Role.PREFILL:  # what lies in decode's pool is of no use to prefill
            self.index.update(worker.id, report.blocks_added, report.blocks_removed)
        self.index.update(worker.hello.store_id, report.store_added, report.store_removed)

    def has_store(self, store: Address) -> bool:
        """Whether any worker still speaks for that store node's host."""
        return any(worker.hello.store == store for worker in self._workers.values())

    def _has_store_id(self, store_id: StoreId) -> bool:
        return any(worker.hello.store_id == store_id for worker in self._workers.values())
