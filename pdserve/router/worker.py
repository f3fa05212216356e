"""What the router knows of a worker: its own bookkeeping, corrected by the worker's reports.

A *held* request is one this router sent there and has not seen leave: at a prefill worker what it
computes or is about to, at a decode worker what runs there or is on its way. Reports trail behind
what was just sent, and know of work that a router before this one sent; so a worker is taken to be
as busy as the larger of the two numbers says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from pdserve.ids import RequestId, WorkerId
from pdserve.messages import Hello, Role
from pdserve.router.costs import Correction

HELD_MAX: Final = 8
"""Prompts at one prefill worker, however short."""


class Held:
    """What is left to compute of a prompt at its worker. No dataclass, as ``placement.Choice``."""

    __slots__ = ("is_new", "tokens", "work_ns")

    def __init__(self, tokens: int, work_ns: int, *, is_new: bool) -> None:
        self.tokens = tokens
        self.work_ns = work_ns  # predicted of a worker as fast as the cost model says
        self.is_new = is_new  # no chunk of it has been reported since it was sent there


@dataclass(slots=True, eq=False)
class Worker:
    hello: Hello
    slot: int
    last_heard_ns: int
    correction: Correction
    free_blocks: int
    prefills: bool  # may be sent prompts
    decodes: bool  # may be sent hand-offs
    stands_in: bool = False  # does both, because nobody is left for what its pool does not do
    next_sequence: int | None = None  # of its reports; None before the first
    draining: bool = False
    running: int = 0  # by its last report, as are the next two
    waiting: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)
    prompts: dict[RequestId, Held] = field(default_factory=dict)
    """In the order in which they are computed."""

    streams: dict[RequestId, None] = field(default_factory=dict)
    reserved_blocks: int = 0  # for streams that have not arrived yet
    context_tokens: int = 0  # of all streams
    chunk_ns: int = 0  # predicted of a whole chunk
    free_at_ns: int = 0  # when it is predicted to be done with its prompts
    is_changed: bool = False  # since it was entered in the arrays
    id: WorkerId = field(init=False)
    pool: Role = field(init=False)  # whose replica it is, whatever its role is now
    chunk_tokens: int = field(init=False)  # as its ``hello`` says; asked for several times
    running_max: int = field(init=False)  # per decision, and a message is slower to read

    def __post_init__(self) -> None:
        self.id = self.hello.worker
        self.pool = self.hello.role
        self.chunk_tokens = self.hello.chunk_tokens
        self.running_max = self.hello.running_max

    def take(self, request: RequestId, held: Held, ahead_of: RequestId | None) -> None:
        """One more prompt, in line where the worker puts it too."""
        if ahead_of is None:
            self.prompts[request] = held
            return
        line = list(self.prompts.items())
        line.insert(list(self.prompts).index(ahead_of), (request, held))
        self.prompts = dict(line)

    @property
    def held(self) -> list[RequestId]:
        return [*self.prompts, *(r for r in self.streams if r not in self.prompts)]

    @property
    def left_tokens(self) -> int:
        """Of all its prompts, uncomputed."""
        return sum([held.tokens for held in self.prompts.values()])

    @property
    def left_ns(self) -> float:
        """In which it is predicted to compute them."""
        return self.correction.factor * sum([held.work_ns for held in self.prompts.values()])

    @property
    def rests(self) -> bool:
        """An operator has drained it: it is there, and does nothing."""
        return not self.prefills and not self.decodes

    @property
    def has_prefill_room(self) -> bool:
        """Late binding: it takes the next prompts once what it has fits into one chunk, so that
        they are there when that chunk is done."""
        if not self.prefills or self.draining or len(self.prompts) >= HELD_MAX:
            return False
        if not self.decodes and self.running + self.waiting > HELD_MAX:
            return False  # it has work from before we knew it
        return self.left_tokens <= self.chunk_tokens

    @property
    def room_blocks(self) -> int:
        """What a new stream may take, so that it and those there can each fill one more block
        before somebody is parked; −1 when it takes none. One with nothing to do gives all."""
        if not self.decodes or self.draining:
            return -1
        bound = max(len(self.streams), self.running + self.waiting if not self.prefills else 0)
        if bound >= self.running_max:
            return -1
        free_blocks = self.free_blocks - self.reserved_blocks
        return free_blocks - (bound + 1 if bound else 0)
