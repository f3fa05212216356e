"""Who may do what at a store node, and what becomes of it when they die."""

import pytest

from pdserve.errors import BlockMissing, CapacityError, FrameError
from pdserve.ids import BlockKey, RequestId, TicketId
from pdserve.kvstore import contents
from pdserve.kvstore import core as core_module
from pdserve.kvstore.answers import WriteGrant
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.slot_states import SlotState
from pdserve.kvstore.tickets import ANYBODY, OwnerId

REQUEST = RequestId("r-1")
T1, T2, T3 = TicketId("t-1"), TicketId("t-2"), TicketId("t-3")


def chain(name: str, count: int) -> list[BlockKey]:
    return [BlockKey(f"{name}{i}".encode().ljust(16, b".")) for i in range(count)]


def commit(core: StoreCore, owner: OwnerId, grant: WriteGrant) -> int:
    if grant.write == 0:
        return grant.stored_count
    for position in range(len(grant.slots)):
        core.filled(owner, grant.write, position, 7)
    stored = core.commit(owner, grant.write)
    core.check()
    return stored


def put(core: StoreCore, owner: OwnerId, keys: list[BlockKey], first: int = 0) -> int:
    return commit(core, owner, core.reserve(owner, keys, first))


def push(
    core: StoreCore, owner: OwnerId, ticket: TicketId, keys: list[BlockKey], first: int = 0
) -> None:
    commit(core, owner, core.reserve_push(owner, ticket, keys, first))


def open_ticket(
    core: StoreCore,
    owner: OwnerId,
    ticket: TicketId,
    block_count: int,
    *,
    reader: str = ANYBODY,
    deadline_ns: int = 100,
    attempt: int = 0,
) -> bool:
    is_open = core.open_ticket(
        owner,
        ticket,
        REQUEST,
        attempt,
        reader=reader,
        block_count=block_count,
        deadline_ns=deadline_ns,
    )
    core.check()
    return is_open


# ── put and claim ────────────────────────────────────────────────────────────────────────────────


def test_what_is_not_committed_cannot_be_found() -> None:
    core = StoreCore(4)
    owner = core.connect("w")
    keys = chain("a", 2)
    grant = core.reserve(owner, keys, 0)
    assert core.claim(owner, keys).slots == ()
    commit(core, owner, grant)
    assert core.claim(owner, keys).slots == grant.slots


def test_a_commit_of_slots_that_are_not_all_filled_is_refused() -> None:
    core = StoreCore(4)
    owner = core.connect("w")
    grant = core.reserve(owner, chain("a", 2), 0)
    core.filled(owner, grant.write, 0, 7)
    with pytest.raises(FrameError, match="not every slot is filled"):
        core.commit(owner, grant.write)
    assert core.claim(owner, chain("a", 2)).slots == ()


def test_blocks_that_are_stored_are_not_written_again() -> None:
    core = StoreCore(4)
    owner = core.connect("w")
    keys = chain("a", 3)
    assert put(core, owner, keys[:2]) == 2
    grant = core.reserve(owner, keys, 0)
    assert grant.first_index == 2
    assert len(grant.slots) == 1
    assert commit(core, owner, grant) == 3
    assert core.reserve(owner, keys, 1) == WriteGrant(0, 3, (), 2)


def test_a_block_without_its_parent_is_not_stored() -> None:
    core = StoreCore(4)
    owner = core.connect("w")
    assert put(core, owner, chain("a", 3), first=1) == 0
    assert core.stat().slots_free == 4


def test_of_two_writers_of_one_key_the_second_uses_the_firsts_block() -> None:
    core = StoreCore(4)
    one, two = core.connect("one"), core.connect("two")
    keys = chain("a", 2)
    first, second = core.reserve(one, keys, 0), core.reserve(two, keys, 0)
    assert set(first.slots).isdisjoint(second.slots)
    assert commit(core, one, first) == 2
    assert commit(core, two, second) == 2
    assert core.claim(one, keys).slots == first.slots
    assert core.stat().slots_free == 2


def test_a_put_is_short_when_everything_else_is_pinned() -> None:
    core = StoreCore(3)
    owner = core.connect("w")
    put(core, owner, chain("a", 2))
    claim = core.claim(owner, chain("a", 2))
    assert put(core, owner, chain("b", 2)) == 1
    core.release(owner, claim.claim)
    assert put(core, owner, chain("b", 3)) == 3
    assert core.claim(owner, chain("a", 2)).slots == ()


def test_a_put_never_evicts_its_own_prefix() -> None:
    core = StoreCore(2)
    owner = core.connect("w")
    keys = chain("a", 4)
    assert put(core, owner, keys[:2]) == 2
    assert put(core, owner, keys) == 2
    assert len(core.claim(owner, keys).slots) == 2


def test_claimed_blocks_stay_and_are_released_once() -> None:
    core = StoreCore(2)
    owner = core.connect("w")
    put(core, owner, chain("a", 2))
    claim = core.claim(owner, chain("a", 2))
    other = core.claim(owner, chain("a", 1))
    core.release(owner, claim.claim)
    core.release(owner, claim.claim)
    core.check()
    assert put(core, owner, chain("b", 2)) == 1, "the other claim still holds one block"
    core.release(owner, other.claim)
    assert core.stat().slots_pinned == 0


def test_an_abandoned_write_frees_its_slots_and_its_prefix() -> None:
    core = StoreCore(3)
    owner = core.connect("w")
    put(core, owner, chain("a", 1))
    grant = core.reserve(owner, chain("a", 3), 0)
    core.abandon(owner, grant.write)
    core.abandon(owner, grant.write)
    core.check()
    assert core.stat().slots_available == 3


def test_a_connection_that_ends_leaves_nothing_behind() -> None:
    core = StoreCore(8)
    dead, alive = core.connect("dead"), core.connect("alive")
    put(core, alive, chain("a", 2))
    core.claim(dead, chain("a", 2))
    core.reserve(dead, chain("b", 2), 0)
    open_ticket(core, dead, T1, 2)
    push(core, dead, T1, chain("c", 1))
    core.reserve_push(dead, T1, chain("c", 2), 1)
    core.disconnect(dead)
    core.check()
    stat = core.stat()
    assert (stat.slots_reserved, stat.slots_pinned, stat.tickets, stat.writes) == (0, 0, 0, 0)
    assert len(core.claim(alive, chain("c", 2)).slots) == 1, "what it had committed stays stored"


def test_a_condemned_block_is_found_by_nobody_and_read_by_nobody() -> None:
    core = StoreCore(4)
    one, two = core.connect("one"), core.connect("two")
    keys = chain("a", 3)
    put(core, one, keys)
    mine, theirs = core.claim(one, keys), core.claim(two, keys)
    core.condemn(one, mine.claim, 1)
    core.check()
    assert len(core.claim(one, keys).slots) == 1
    with pytest.raises(BlockMissing, match="failed its checksum earlier"):
        core.claimed(two, theirs.claim, 1)
    slot, record = core.claimed(two, theirs.claim, 2)
    assert slot == theirs.slots[2]
    assert record.state is SlotState.PRIVATE


def test_a_put_whose_parent_is_condemned_meanwhile_ends_there() -> None:
    core = StoreCore(4)
    owner = core.connect("w")
    keys = chain("a", 3)
    put(core, owner, keys[:1])
    claim = core.claim(owner, keys[:1])
    grant = core.reserve(owner, keys, 0)
    core.condemn(owner, claim.claim, 0)
    assert commit(core, owner, grant) == 0
    assert core.claim(owner, keys).slots == ()
    core.release(owner, claim.claim)
    core.check()
    assert core.stat().slots_free == 4


@pytest.mark.parametrize("index", [-1, 2])
def test_only_blocks_of_the_claim_can_be_read_or_condemned(index: int) -> None:
    core = StoreCore(2)
    owner, other = core.connect("w"), core.connect("x")
    put(core, owner, chain("a", 2))
    claim = core.claim(owner, chain("a", 2))
    for who in (owner, other):
        with pytest.raises(FrameError):
            core.claimed(who, claim.claim, index)
        with pytest.raises(FrameError):
            core.condemn(who, claim.claim, index)


def test_nonsense_is_refused_and_changes_nothing() -> None:
    core = StoreCore(2)
    owner = core.connect("w")
    with pytest.raises(FrameError, match="from 3 on, of 2"):
        core.reserve(owner, chain("a", 2), 3)
    with pytest.raises(FrameError, match="key of 3 bytes"):
        core.reserve(owner, [BlockKey(b"abc")], 0)
    with pytest.raises(FrameError, match="write 99 is not open"):
        core.commit(owner, 99)
    grant = core.reserve(owner, chain("a", 1), 0)
    with pytest.raises(FrameError, match="position 1 of a write of 1"):
        core.filled(owner, grant.write, 1, 7)
    with pytest.raises(FrameError, match="no checksum"):
        core.filled(owner, grant.write, 0, -1)
    with pytest.raises(FrameError, match="0 blocks"):
        open_ticket(core, owner, T1, 0)
    core.check()


def test_keys_in_the_wrong_order_are_stored_as_far_as_they_make_sense() -> None:
    core = StoreCore(4)
    owner = core.connect("w")
    a, b, c = chain("a", 3)
    put(core, owner, [a, b, c])
    assert put(core, owner, [a, c]) == 1
    assert put(core, owner, [c]) == 0
    core.check()


def test_claims_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "CLAIMS_MAX", 2)
    core = StoreCore(2)
    owner = core.connect("w")
    put(core, owner, chain("a", 1))
    core.claim(owner, chain("a", 1))
    core.claim(owner, chain("a", 1))
    with pytest.raises(CapacityError, match="2 claims are held"):
        core.claim(owner, chain("a", 1))
    core.check()


def test_writes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "WRITES_MAX", 1)
    core = StoreCore(4)
    owner = core.connect("w")
    core.reserve(owner, chain("a", 1), 0)
    with pytest.raises(CapacityError, match="1 writes are held"):
        core.reserve(owner, chain("b", 1), 0)


# ── changes ──────────────────────────────────────────────────────────────────────────────────────


def test_changes_tell_what_came_and_went() -> None:
    core = StoreCore(2)
    owner = core.connect("w")
    put(core, owner, chain("a", 2))
    changes = core.changes(0)
    assert (changes.added, changes.removed) == (tuple(chain("a", 2)), ())
    put(core, owner, chain("b", 1))
    later = core.changes(changes.sequence)
    assert (later.added, later.removed) == (tuple(chain("b", 1)), (chain("a", 2)[1],))
    assert later.complete


def test_a_reader_that_comes_too_late_begins_anew() -> None:
    core = StoreCore(4, changes_max=2)
    owner = core.connect("w")
    put(core, owner, chain("a", 3))
    changes = core.changes(0)
    assert not changes.complete
    assert changes.added == tuple(chain("a", 3))


def test_a_whole_store_is_as_much_as_one_message_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "WHOLE_KEYS_MAX", 3)
    keys = chain("a", 2)
    core = StoreCore(4, lower={*keys, *chain("c", 2)}, changes_max=2)
    owner = core.connect("w")
    put(core, owner, keys)
    put(core, owner, chain("b", 2))
    changes = core.changes(-1)
    assert not changes.complete
    assert set(changes.added) < {*keys, *chain("b", 2)}, "what is in memory, parents first"
    assert len(changes.added) == 3
    assert {keys[0], chain("b", 1)[0]} < set(changes.added)


# ── a tier below ─────────────────────────────────────────────────────────────────────────────────


def test_what_is_below_counts_as_stored() -> None:
    keys = chain("a", 3)
    below = set(keys[:2])
    core = StoreCore(2, lower=below)
    writer = core.connect("w")
    assert set(core.changes(0).added) == below
    begin = core.changes(0).sequence
    put(core, writer, keys[:2])
    assert core.prefix_count(keys) == 2
    put(core, writer, chain("b", 2))
    assert core.prefix_count(keys) == 0
    changes = core.changes(begin)
    assert (set(changes.added), changes.removed) == (set(chain("b", 2)), ())
    below.discard(keys[1])
    core.lower_tier_changed([keys[1]], has_them=False)
    assert core.changes(begin).removed == (keys[1],)


def test_what_leaves_below_while_it_is_above_stays() -> None:
    keys = chain("a", 2)
    below = set(keys)
    core = StoreCore(2, lower=below)
    put(core, core.connect("w"), keys)
    begin = core.changes(0).sequence
    below.clear()
    core.lower_tier_changed(keys, has_them=False)
    assert core.changes(begin).removed == ()


def test_a_list_of_everything_has_both_tiers() -> None:
    core = StoreCore(8, lower=chain("below", 2), changes_max=1)
    put(core, core.connect("w"), chain("a", 2))
    changes = core.changes(0)
    assert not changes.complete
    assert changes.added == (*chain("a", 2), *chain("below", 2))
