"""What the mover can be asked to do with blocks, and what it answers. Plain values.

Every move names its store and the device blocks it touches; ``device.Device`` keeps those held
until the move's answer is collected, so no move ever touches a block that is somebody else's by
then.
"""

from dataclasses import dataclass
from typing import Any

from pdserve.engine.outputs import ToDecode
from pdserve.engine.restoring import PrefillSpeed
from pdserve.errors import PdserveError
from pdserve.ids import BlockId, BlockKey, RequestId, TicketId
from pdserve.messages import Address

ANY_READER = "*"
"""Reader of a ticket that whoever is told of it may adopt; it lives as long as its writer."""


@dataclass(frozen=True, slots=True)
class Restore:
    """Copy what the store has of ``keys[first:]``, up to the first that it lacks; or, where a
    ``speed`` is known, up to where computing the rest is sooner."""

    store: Address
    keys: tuple[BlockKey, ...]
    first: int
    blocks: tuple[BlockId, ...]  # of keys[first:]
    prompt_tokens: int = 0
    block_tokens: int = 1
    speed: PrefillSpeed | None = None  # at which this worker computes what is not restored
    tenant: str = ""  # whose share of the store it counts against, here and below


@dataclass(frozen=True, slots=True)
class OpenTicket:
    store: Address
    request: RequestId
    attempt: int
    reader: str
    block_count: int
    wait_ms: int
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Push:
    """Put ``keys[first:]`` into the store under the ticket; then, perhaps, the tail, and seal."""

    store: Address
    ticket: TicketId
    keys: tuple[BlockKey, ...]
    first: int
    blocks: tuple[BlockId, ...]  # of keys[first:]
    seal: bool = False
    tail: BlockId | None = None
    announce: ToDecode | None = None
    """Said as soon as it is sealed, where the mover can: a step of the engine's may be long."""


@dataclass(frozen=True, slots=True)
class PushLayers:
    """While a step computes them: copy the first ``layers`` of a request's next blocks, its last,
    ``tail``, included, into its ticket's slots. A ``Push`` of the same, or an ``Abort``, follows.

    It is named by the request: its ticket may have been opened since anybody looked.
    """

    store: Address
    request: RequestId
    attempt: int
    keys: tuple[BlockKey, ...]
    first: int
    blocks: tuple[BlockId, ...]  # of keys[first:]
    tail: BlockId | None
    layers: int
    done: Any  # what must have happened before they are read, see ``model.ops.LayersTold``


@dataclass(frozen=True, slots=True)
class Abort:
    """Give up a ticket: one that this worker opened, or one that was opened for it."""

    store: Address
    ticket: TicketId


@dataclass(frozen=True, slots=True)
class AbortAttempts:
    """Give up whatever tickets there are for this worker to adopt of a request, this attempt's and
    earlier ones'; None: all. It has not been told of them, and may never be."""

    store: Address
    request: RequestId
    attempt: int | None


@dataclass(frozen=True, slots=True)
class Adopt:
    """Take a sealed ticket and copy its blocks, except where None stands."""

    store: Address
    ticket: TicketId
    blocks: tuple[BlockId | None, ...]


@dataclass(frozen=True, slots=True)
class Put:
    """Store full blocks under their keys, those that the store lacks."""

    store: Address
    keys: tuple[BlockKey, ...]
    blocks: tuple[BlockId, ...]
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Park:
    """Open a ticket that anybody may adopt, push everything, seal it."""

    store: Address
    request: RequestId
    attempt: int
    keys: tuple[BlockKey, ...]
    blocks: tuple[BlockId, ...]
    tail: BlockId | None
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Forsake:
    """Hang up on the store: whatever this worker still holds there by its connection ends."""

    store: Address


Move = (
    Restore | OpenTicket | Push | PushLayers | Abort | AbortAttempts | Adopt | Put | Park | Forsake
)


@dataclass(frozen=True, slots=True)
class Moved:
    """The answer to a move. With an ``error`` the move did not, or not wholly, happen."""

    move: Move
    owner: Any  # what the loop gave with the move
    count: int = 0  # blocks restored, adopted or stored
    ticket: TicketId | None = None  # of OpenTicket and Park
    error: PdserveError | None = None
    announced: bool = False  # what the push was to announce has been said


def blocks_touched(move: Move) -> tuple[BlockId, ...]:
    """The device blocks that must stay as they are until the move is done."""
    match move:
        case OpenTicket() | Abort() | AbortAttempts() | Forsake():
            return ()
        case Adopt():
            return tuple(block for block in move.blocks if block is not None)
        case Push() | PushLayers() | Park():
            return move.blocks if move.tail is None else (*move.blocks, move.tail)
        case Restore() | Put():
            return move.blocks
