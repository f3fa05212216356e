"""What a master says to store nodes; part of ``protocol``.

It asks a node, at the node's own socket, for what came and went. With each question goes the epoch
under which it leads and the one under which the node is a member, and either side refuses what is
older than it knows. Keys go in bodies, joined, since a million of them are no message.
"""

from dataclasses import dataclass

from pdserve.messages import Address


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


@dataclass(frozen=True, slots=True)
class AskParents:
    """Which block builds on which."""

    master_epoch: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Parents:
    """The body: of each block its key and its parent's, which is zero where there is none."""

    blocks: int


@dataclass(frozen=True, slots=True)
class CopyChain:
    """Get what is missing of a chain from another node, into slots that are free. ``Copied``."""

    master_epoch: int
    epoch: int
    keys: bytes  # joined, from the chain's first
    source: Address
    deadline_ms: int


@dataclass(frozen=True, slots=True)
class Copied:
    blocks: int  # that this brought
    present: int  # leading blocks of the chain that are there now


@dataclass(frozen=True, slots=True)
class Refused:
    """One of the two epochs is not what the node has, which is this."""

    master_epoch: int  # the highest that it was ever spoken to under
    epoch: int


MESSAGES = (AskDeltas, Deltas, AskParents, Parents, CopyChain, Copied, Refused)
