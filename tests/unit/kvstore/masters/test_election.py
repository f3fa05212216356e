"""Who leads, over all interleavings of a few steps and over long random ones."""

import copy
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.errors import StaleEpoch
from pdserve.ids import HostId
from pdserve.kvstore.masters.election import BEAT_NS, LEASE_NS, Election, Fence, Renew, Take
from pdserve.kvstore.masters.metadata import Seat
from pdserve.messages import Address

ADDRESS = Address(HostId("h"), "/m", "")


@dataclass
class Table:
    """The metadata, as far as masters use it."""

    seat: Seat | None = None
    epoch: int = 0

    def next_epoch(self, *, above: int) -> int:
        self.epoch = max(self.epoch, above) + 1
        return self.epoch

    def change(self, seen: Seat | None, after: Seat) -> bool:
        if self.seat != seen:
            return False
        self.seat = after
        return True


@dataclass
class Candidate:
    election: Election
    now_ns: int = 0
    read: tuple[Seat | None] | None = None
    bid: tuple[Seat | None, Seat] | None = None


@dataclass
class World:
    """Each step of a candidate is one visit to the table, or none; between two of them anything
    may happen, its process be stopped, and answers be lost."""

    table: Table = field(default_factory=Table)
    fence: Fence = field(default_factory=Fence)
    candidates: list[Candidate] = field(default_factory=list)
    under: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def of(count: int) -> "World":
        return World(
            candidates=[Candidate(Election(f"m{index}", ADDRESS)) for index in range(count)]
        )

    def look(self, who: int) -> None:
        each = self.candidates[who]
        each.read = (self.table.seat,)

    def plan(self, who: int) -> None:
        each = self.candidates[who]
        if each.read is None:
            return
        (seat,), each.read = each.read, None
        match each.election.look(seat, each.now_ns):
            case Renew(seen, after):
                each.bid = (seen, after)
            case Take(seen, above) as take:
                epoch = self.table.next_epoch(above=above)
                each.bid = (seen, each.election.seat_of(take, epoch))

    def put(self, who: int, *, answered: bool = True) -> None:
        each = self.candidates[who]
        if each.bid is None:
            return
        (seen, after), each.bid = each.bid, None
        before = self.table.seat
        done = self.table.change(seen, after)
        if done and before is not None:
            assert after.epoch >= before.epoch, "the seat's epoch only grows"
        if answered and done:
            each.election.won(after)
        elif answered:
            each.election.refused()

    def command(self, who: int) -> None:
        """To a node; it obeys the highest epoch that it has heard of."""
        election = self.candidates[who].election
        if election.epoch is None:
            return
        before = self.fence.epoch
        try:
            self.fence.admit(election.epoch)
        except StaleEpoch:
            election.fenced(before)
            assert election.epoch is None
        else:
            assert election.epoch >= before

    def tick(self, who: int) -> None:
        self.candidates[who].now_ns += LEASE_NS

    def leave(self, who: int) -> None:
        leaving = self.candidates[who].election.leaving()
        if leaving is not None:
            self.table.change(leaving.seen, leaving.after)

    def check(self) -> None:
        for each in self.candidates:
            epoch = each.election.epoch
            if epoch is not None:
                leader = self.under.setdefault(epoch, each.election.master)
                assert leader == each.election.master, f"two lead under epoch {epoch}"

    def key(self) -> str:
        return repr((self.table, self.fence.epoch, [vars(c.election) for c in self.candidates],
                     [(c.now_ns, c.read, c.bid) for c in self.candidates]))  # fmt: skip


STEPS = ("look", "plan", "put", "command", "tick", "leave")


def test_no_two_lead_under_one_epoch_in_any_interleaving() -> None:
    """Breadth first, each state once, of two candidates."""
    depth_max = 7
    seen, waiting = set(), deque([(World.of(2), 0)])
    while waiting:
        world, depth = waiting.popleft()
        for step in STEPS:
            for who in range(2):
                after = copy.deepcopy(world)
                getattr(after, step)(who)
                after.check()
                key = after.key()
                if key not in seen:
                    seen.add(key)
                    if depth + 1 < depth_max:
                        waiting.append((after, depth + 1))
    assert len(seen) > 1000


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from((*STEPS, "lost")), st.integers(0, 2)), min_size=1, max_size=120
    )
)
def test_nor_in_long_ones_and_in_the_end_somebody_leads(steps: list[tuple[str, int]]) -> None:
    world = World.of(3)
    for step, who in steps:
        if step == "lost":
            world.put(who, answered=False)
        else:
            getattr(world, step)(who)
        world.check()
    for _ in range(12):  # all live again, and are obeyed or refused
        for who in range(3):
            for step in ("tick", "look", "plan", "put", "command"):
                getattr(world, step)(who)
            world.check()
    leaders = [c.election for c in world.candidates if c.election.epoch is not None]
    assert world.table.seat is not None
    assert [each.epoch for each in leaders if each.epoch == world.fence.epoch]


def one(name: str = "m") -> tuple[Election, Table]:
    return Election(name, ADDRESS), Table()


def lead(election: Election, table: Table, now_ns: int = 0) -> Seat:
    bid = election.look(table.seat, now_ns)
    assert isinstance(bid, Take)
    seat = election.seat_of(bid, table.next_epoch(above=bid.above))
    assert table.change(bid.seen, seat)
    election.won(seat)
    return seat


def renew(election: Election, table: Table, now_ns: int = 0) -> None:
    bid = election.look(table.seat, now_ns)
    assert isinstance(bid, Renew)
    assert table.change(bid.seen, bid.after)
    election.won(bid.after)


def test_a_beat_that_goes_on_keeps_others_away_and_one_that_stops_does_not() -> None:
    leader, table = one("a")
    standby, _ = one("b")
    first = lead(leader, table)
    now_ns = 0
    for _ in range(10):
        now_ns += BEAT_NS
        renew(leader, table, now_ns)
        assert standby.look(table.seat, now_ns) is None
    assert standby.look(table.seat, now_ns + LEASE_NS - 1) is None
    second = lead(standby, table, now_ns + LEASE_NS)
    assert second.epoch > first.epoch
    assert leader.epoch == first.epoch, "it does not know yet"
    leader.look(table.seat, now_ns + LEASE_NS)
    assert leader.epoch is None


def test_who_leaves_or_hangs_up_is_not_waited_for() -> None:
    leader, table = one("a")
    standby, _ = one("b")
    seat = lead(leader, table)
    assert standby.look(table.seat, 0) is None
    standby.suspect(seat.epoch)
    assert isinstance(standby.look(table.seat, 1), Take)
    renew(leader, table)
    assert standby.look(table.seat, 2) is None, "it has renewed since: it lives"
    assert standby.look(table.seat, 3) is None
    leaving = leader.leaving()
    assert leaving is not None
    assert table.change(leaving.seen, leaving.after)
    assert isinstance(standby.look(table.seat, 4), Take)


def test_a_renewal_whose_answer_was_lost_is_no_loss_of_the_seat() -> None:
    leader, table = one()
    lead(leader, table)
    bid = leader.look(table.seat, 0)
    assert isinstance(bid, Renew)
    assert table.change(bid.seen, bid.after)  # and nobody says so
    renew(leader, table)
    assert leader.epoch == 1


def test_a_table_begun_anew_does_not_give_an_epoch_twice() -> None:
    leader, table = one()
    lead(leader, table)
    leader.fenced(41)
    assert leader.epoch is None
    assert leader.look(table.seat, 0) is None
    assert lead(leader, table, LEASE_NS).epoch == 42


def test_a_fence_refuses_what_is_older() -> None:
    fence = Fence()
    fence.admit(3)
    fence.admit(3)
    with pytest.raises(StaleEpoch, match="speaks under epoch 2, and epoch 3 has begun"):
        fence.admit(2)
