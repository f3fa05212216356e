"""The store with one guard taken away: each must turn the campaign red.

Guards stand behind each other (a pin, the generation, the key, the checksum), and what one lets
through the next one stops. Where a guard is not the first, a *fault* makes those before it fail:
pins are forgotten, bytes are damaged, records change places on the disk. The *control* of such a
mutant is the fault with the guard in place, and must stay green.

The changes are made in the campaign's own processes, by subclasses and by replaced functions; the
product has no switch for them.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pdserve.kvstore import node, transfer
from pdserve.kvstore.answers import ClaimGrant
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.masters import block_index, metadata
from pdserve.kvstore.pipeline import Corrupt
from pdserve.kvstore.server import StoreServer
from pdserve.kvstore.ssd import log as ssd_log
from pdserve.kvstore.tickets import OwnerId
from pdserve.wire.connection import Frame
from tests.campaign.cores import (
    ForgetsPins,
    IgnoresBoards,
    KeepsForTheDead,
    LeasesPins,
    LooksTooLate,
    PublishesEarly,
    ReusesAborted,
    StoresOrphans,
)

DAMAGED_RATIO = 0.02
FORGOTTEN_RATIO = 0.001
FOREVER_S = 1e6


def _core(cls: type[StoreCore]) -> Callable[[], None]:
    def change() -> None:
        node.StoreCore = cls  # type: ignore[attr-defined]

    return change


# ── other parts without a guard ──────────────────────────────────────────────────────────────────


class _Anything(int):
    """Equal to every number."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int)

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, int)

    __hash__ = int.__hash__


def _ignore_generations() -> None:
    for cls in (transfer.SharedMemory, transfer.Sockets):
        for name in ("receive", "copy"):
            _ignore_generations_of(cls, name)


def _ignore_generations_of(cls: Any, name: str) -> None:
    read = getattr(cls, name)

    def read_any(self: Any, claim: ClaimGrant, *arguments: Any) -> None:
        read(self, _of_any_generation(claim), *arguments)

    setattr(cls, name, read_any)


def _of_any_generation(claim: ClaimGrant) -> ClaimGrant:
    return replace(claim, generations=tuple(_Anything(each) for each in claim.generations))


def _ignore_what_the_disk_gives() -> None:
    ssd_log.block_checksum = lambda key, payload: _Anything()  # type: ignore[attr-defined]


def _forget_some_answers() -> None:
    take = StoreServer._take
    chance = random.Random(1)

    def take_or_forget(
        self: StoreServer, owner: OwnerId, connection: Any, capability: Any, frame: Frame
    ) -> Any:
        answer, body, sent = take(self, owner, connection, capability, frame)
        if chance.random() >= FORGOTTEN_RATIO:
            return answer, body, sent
        if sent is not None:
            sent()
        return None, (), None

    change: Any = StoreServer
    change._take = take_or_forget


def _wait_for_ever() -> None:
    call = StoreClient._call

    def call_for_ever(self: StoreClient, message: object, *arguments: Any, **options: Any) -> Any:
        return call(self, message, *arguments, **{**options, "timeout_s": FOREVER_S})

    change: Any = StoreClient
    change._call = call_for_ever


def _believe_everybody() -> None:
    """Who speaks last is the member, whatever its epoch."""

    def register(self: Any, member: metadata.Member) -> None:
        with self._transaction() as table:
            table.execute(
                "INSERT OR REPLACE INTO member VALUES (?, ?, ?)",
                (member.store_id, member.epoch, metadata._to_json(member)),
            )

    def remove(self: Any, store_id: str, epoch: int) -> None:
        with self._transaction() as table:
            table.execute("DELETE FROM member WHERE store_id = ?", (store_id,))

    change: Any = metadata.EmbeddedMetadata
    change.register, change.remove = register, remove
    for name in ("_REGISTER", "_REMOVE"):
        script = getattr(metadata, name)
        unfenced = script.replace("if known > tonumber(ARGV[2]) then return 0 end", "")
        assert unfenced != script
        setattr(metadata, name, unfenced)


def _keep_lost_locations() -> None:
    change: Any = block_index.BlockIndex
    apply = change.apply
    change.apply = lambda self, node, added, removed: apply(self, node, added, ())


def _take_any_seat() -> None:
    """Without a look at who has it."""

    def change_seat(self: Any, seen: object, after: metadata.Seat) -> bool:
        with self._transaction() as table:
            body = metadata._to_json(after)
            table.execute("INSERT OR REPLACE INTO seat VALUES (1, ?)", (body,))
        return True

    change: Any = metadata.EmbeddedMetadata
    change.change_seat = change_seat


# ── the list ─────────────────────────────────────────────────────────────────────────────────────


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A guard that is gone, beside the fault that reaches it."""

    name: str
    guard: str
    fault: str = ""
    change_node: Callable[[], None] = _nothing
    change_client: Callable[[], None] = _nothing
    change_master: Callable[[], None] = _nothing
    budget_s: float = 120.0
    all_verify: bool = False
    no_verify: bool = False
    tolerates_misses: bool = False
    views: bool = True  # readers look at bytes where they lie; then a pin is their only guard
    tolerates_hang_ups: bool = False  # a node that does not answer is taken for dead
    damages_writes: bool = False
    damages_arenas: bool = False  # of the dead, before their next node
    swaps_records: bool = False

    @property
    def is_nodes(self) -> bool:
        return self.change_node is not _nothing

    @property
    def is_masters(self) -> bool:
        return self.change_master is not _nothing

    @property
    def is_control(self) -> bool:
        return not self.guard

    def corrupts(self, name: str, chance: random.Random) -> Corrupt | None:
        """What an actor of that name does to bytes on their way."""
        if not self.damages_writes or not name.startswith(("writer", "prefill")):
            return None

        def damage(view: memoryview) -> None:
            if chance.random() < DAMAGED_RATIO:
                view[chance.randrange(len(view))] ^= 1 << chance.randrange(8)

        return damage


_FORGOTTEN: dict[str, Any] = {
    "fault": "the node forgets its pins",
    "change_node": _core(ForgetsPins),
    "all_verify": True,
    "tolerates_misses": True,
    "views": False,
}
_LATE: dict[str, Any] = {"fault": "the node looks at no board before it evicts"}
_UNANSWERED: dict[str, Any] = {
    "fault": "the node forgets one answer in a thousand",
    "change_node": _forget_some_answers,
    "tolerates_hang_ups": True,
}
_DAMAGED: dict[str, Any] = {
    "fault": "one block in fifty is damaged after its checksum was taken",
    "damages_writes": True,
    "tolerates_misses": True,
}
_DECAYED: dict[str, Any] = {
    "fault": "blocks in the arena of a dead node are damaged before the next one has it",
    "damages_arenas": True,
    "tolerates_misses": True,
}
_SWAPPED: dict[str, Any] = {
    "fault": "records change places on the disk",
    "swaps_records": True,
}

ALL: tuple[Mutant, ...] = (
    Mutant(
        name="commit-last",
        guard="a block is found once its bytes are there",
        change_node=_core(PublishesEarly),
    ),
    Mutant(
        name="pins",
        guard="what is claimed is not evicted",
        change_node=_core(ForgetsPins),
    ),
    Mutant(
        name="hazards",
        guard="a slot that a reader's board names is not reused",
        change_node=_core(IgnoresBoards),
        **_LATE,
    ),
    Mutant(
        name="no-timer",
        guard="only its owner ends a claim",
        change_node=_core(LeasesPins),
    ),
    Mutant(
        name="quarantine",
        guard="an aborted write's slots are its writer's until it says so",
        change_node=_core(ReusesAborted),
    ),
    Mutant(
        name="parent-present",
        guard="a block is stored after its parent",
        change_node=_core(StoresOrphans),
    ),
    Mutant(
        name="owner-death",
        guard="what the dead held is released",
        change_node=_core(KeepsForTheDead),
    ),
    Mutant(
        name="epoch-fence",
        guard="an older epoch neither replaces nor removes a younger one",
        change_node=_believe_everybody,
    ),
    Mutant(
        name="generation",
        guard="a reader compares the slot's generation",
        change_client=_ignore_generations,
        **_FORGOTTEN,
    ),
    Mutant(
        name="checksum",
        guard="a reader verifies the checksum",
        no_verify=True,
        **_DAMAGED,
    ),
    Mutant(
        name="adopted",
        guard="a reader verifies what a node took over",
        no_verify=True,
        **_DECAYED,
    ),
    Mutant(
        name="disk-key",
        guard="a record's checksum covers its key",
        change_node=_ignore_what_the_disk_gives,
        **_SWAPPED,
    ),
    Mutant(
        name="deadline",
        guard="a call waits for its answer until its deadline",
        change_client=_wait_for_ever,
        **_UNANSWERED,
    ),
    Mutant(
        name="located",
        guard="what a node has lost is located there no more",
        change_master=_keep_lost_locations,
    ),
    Mutant(
        name="seat",
        guard="a master takes the seat only if it is as it was seen",
        change_master=_take_any_seat,
    ),
)
MUTANTS = {
    mutant.name: mutant
    for mutant in (
        *ALL,
        Mutant(name="control-generation", guard="", **_FORGOTTEN),
        Mutant(name="control-hazards", guard="", change_node=_core(LooksTooLate), **_LATE),
        Mutant(name="control-checksum", guard="", all_verify=True, **_DAMAGED),
        Mutant(name="control-adopted", guard="", all_verify=True, **_DECAYED),
        Mutant(name="control-disk-key", guard="", **_SWAPPED),
        Mutant(name="control-deadline", guard="", **_UNANSWERED),
    )
}
"""By name; the controls too, which have a fault and every guard."""
