"""What an engine loop is, and what it says.

A loop is told messages with ``handle`` and does one piece of work per ``step``, which returns what
it has to say: outputs, each with where it goes. ``load`` says how full it is. Who carries the
outputs (sockets, a test) is not its business.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pdserve.ids import BlockKey
from pdserve.messages import (
    Address,
    Attained,
    ChunkDone,
    Handoff,
    Parked,
    Progress,
    TokenDelta,
    WorkerFailed,
)
from pdserve.prompt_tasks import PromptDelta


@dataclass(frozen=True, slots=True)
class ToDecode:
    address: Address
    message: Handoff


@dataclass(frozen=True, slots=True)
class ToGateway:
    address: Address
    message: TokenDelta


@dataclass(frozen=True, slots=True)
class OfPrompt:
    """To a gateway, before the ``ToGateway`` that ends the request."""

    address: Address
    message: PromptDelta


@dataclass(frozen=True, slots=True)
class ToRouter:
    message: Progress | ChunkDone | WorkerFailed | Parked


Output = ToDecode | ToGateway | OfPrompt | ToRouter


@dataclass(frozen=True, slots=True)
class Load:
    """How full a loop is, and which keys came to and left its device pool since it last said so."""

    running: int  # sequences that hold blocks
    waiting: int  # taken, not yet begun
    free_blocks: int  # idle cached ones included
    blocks_added: tuple[BlockKey, ...] = ()
    blocks_removed: tuple[BlockKey, ...] = ()
    attained: tuple[Attained, ...] = ()  # about once a second
    counters: Mapping[str, int] = field(default_factory=dict)

    def without_deltas(self) -> "Load":
        return replace(self, blocks_added=(), blocks_removed=(), attained=())


@dataclass(frozen=True, slots=True)
class GiveUp:
    """To a loop: the router that gave out what is here is gone. All of it comes back, from the
    gateways and as later attempts, so nobody waits for these."""


class Loop(Protocol):
    """All methods are called from one thread."""

    def handle(self, message: Any) -> None:
        """Take a message in. What it leads to is said by the next ``step``."""
        ...

    def step(self) -> list[Output]:
        """Collect finished moves, then at most one forward pass."""
        ...

    def busy(self) -> bool:
        """False: another step would do nothing until a message or a finished move."""
        ...

    def load(self) -> Load: ...

    def drain(self) -> None:
        """Take nothing new, give back what is here; drained when nothing runs and waits."""
        ...

    def wake_by(self, wake: Callable[[], None]) -> None:
        """``wake`` is called, from any thread, when a finished move waits to be collected."""
        ...

    def close(self) -> None:
        """Let go of threads and connections. Nothing is called afterwards."""
        ...
