"""What a master says to store nodes; part of ``protocol``.

It asks a node, at the node's own socket, for what came and went. With each question goes the epoch
under which it leads and the one under which the node is a member, and either side refuses what is
older than it knows. Keys go in bodies, joined, since a million of them are no message.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pdserve.errors import FrameError
from pdserve.ids import BlockKey
from pdserve.messages import Address

_PARENT = struct.Struct("<16s16sIBfB")
_AGE = struct.Struct("<IB")
AGE_MS_MAX = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class AskDeltas:
    """Every message of a master begins with these two epochs."""

    master_epoch: int
    epoch: int  # of the node, as the master has it
    after: int  # -1: everything


@dataclass(frozen=True, slots=True)
class Deltas:
    """What became of a node's blocks. The body: ``added`` keys, then ``removed`` ones."""

    epoch: int
    after: int  # of the question
    sequence: int  # ask for what comes after this one next time
    is_whole: bool  # the added ones are all there is, whatever was said before
    added: int
    removed: int
    slots_free: int
    block_bytes: int
    codec: int
    is_draining: bool
    under_way: int = 0  # of a node that drains: writes and hand-offs that may bring blocks still


@dataclass(frozen=True, slots=True)
class AskParents:
    """Which block builds on which."""

    master_epoch: int
    epoch: int


class Remembered(NamedTuple):
    """What its node knows of a block, for the one that is to have it."""

    age_ms: int = AGE_MS_MAX  # since its last use, at least
    turn: int = 0  # of the conversation that used it last
    worth: float = 0.0  # to its node
    account: int = 0  # its tenant's, in ``Parents.tenants``


class Child(NamedTuple):
    key: BlockKey
    parent: BlockKey  # zero where there is none
    remembered: Remembered


@dataclass(frozen=True, slots=True)
class Parents:
    """The body: a ``Child`` for each block, in 42 bytes."""

    blocks: int
    tenants: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CopyChain:
    """Get what is missing of a chain from another node, into slots that are free. ``Copied``."""

    master_epoch: int
    epoch: int
    keys: bytes  # joined, from the chain's first
    source: Address
    deadline_ms: int
    ages: bytes = b""
    """Of each block, its age and turn, in 5 bytes: slots of what is worth less may be had too."""

    tenant: str = ""  # on whose account, where there are ages


@dataclass(frozen=True, slots=True)
class Copied:
    blocks: int  # that this brought
    present: int  # leading blocks of the chain that are there now
    is_outweighed: bool = False  # what is missing is: all that might go for it is worth more


@dataclass(frozen=True, slots=True)
class Refused:
    """One of the two epochs is not what the node has, which is this."""

    master_epoch: int  # the highest that it was ever spoken to under
    epoch: int


def pack_child(child: Child) -> bytes:
    age_ms, turn, worth, account = child.remembered
    return _PARENT.pack(child.key, child.parent, min(age_ms, AGE_MS_MAX), turn, worth, account)


def children_in(body: bytes | memoryview) -> Iterator[Child]:
    """Raises FrameError for a body that is no whole number of them."""
    if len(body) % _PARENT.size:
        raise FrameError(f"{len(body)} bytes of parents, a block takes {_PARENT.size}")
    for key, parent, *remembered in _PARENT.iter_unpack(body):
        yield Child(BlockKey(key), BlockKey(parent), Remembered(*remembered))


def pack_ages(chain: Sequence[Remembered]) -> bytes:
    return b"".join(_AGE.pack(each.age_ms, each.turn) for each in chain)


def ages_in(data: bytes, blocks: int) -> list[tuple[int, int]]:
    """(age_ms, turn) of each block; none where none were sent. Raises FrameError."""
    if data and len(data) != blocks * _AGE.size:
        raise FrameError(f"{len(data)} bytes of ages for {blocks} blocks of {_AGE.size}")
    return list(_AGE.iter_unpack(data))


MESSAGES = (AskDeltas, Deltas, AskParents, Parents, CopyChain, Copied, Refused)
