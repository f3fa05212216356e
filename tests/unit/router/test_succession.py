"""Who leads: at most one router in an epoch, whatever they believe of each other; and one in the
end, once nobody dies any more and the register answers."""

import random

import pytest

from pdserve.ids import HostId
from pdserve.messages import Address
from pdserve.router.succession import (
    Claim,
    Deposed,
    Doing,
    Found,
    Gone,
    Lead,
    Look,
    Outcome,
    Term,
    Unanswered,
    Watch,
    next_doing,
)


def address(name: str) -> Address:
    return Address(HostId("h"), name, "")


A, B = address("a"), address("b")


@pytest.mark.parametrize(
    ("done", "outcome", "next_one"),
    [
        (Look(), Found(None), Claim(1)),
        (Look(), Found(Term(3, B)), Watch(Term(3, B))),
        (Look(), Found(Term(3, A)), Lead(3)),  # our claim was entered, and the answer got lost
        (Claim(4), Found(Term(4, A)), Lead(4)),
        (Claim(4), Found(Term(4, B)), Watch(Term(4, B))),
        (Claim(4), Found(Term(9, B)), Watch(Term(9, B))),
        (Claim(4), Unanswered(), Look(again=True)),
        (Watch(Term(3, B)), Gone(), Claim(4)),
        (Watch(Term(3, B)), Deposed(), Look(again=True)),
        (Lead(3), Deposed(), Look()),
    ],
)
def test_the_table(done: Doing, outcome: Outcome, next_one: Doing) -> None:
    assert next_doing(done, outcome, A) == next_one


class Cluster:
    """Candidates and their register; every step is one candidate's, chosen at random."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.register: dict[int, Address] = {}
        self.doing: dict[Address, Doing] = {}
        self.led: dict[int, Address] = {}  # by epoch: who ever led in it
        self.born = 0
        self.is_calm = False
        for _ in range(3):
            self.start()

    def start(self) -> None:
        self.born += 1
        self.doing[address(str(self.born))] = Look()

    def step(self) -> None:
        if not self.is_calm and self.chance.random() < 0.05:
            del self.doing[self.chance.choice(list(self.doing))]  # dies, and another is started
            self.start()
        own = self.chance.choice(list(self.doing))
        outcome = self.outcome(own, self.doing[own])
        if outcome is not None:
            self.doing[own] = doing = next_doing(self.doing[own], outcome, own)
            if isinstance(doing, Lead):
                assert self.led.setdefault(doing.epoch, own) == own, f"two led in {doing.epoch}"

    def outcome(self, own: Address, doing: Doing) -> Outcome | None:
        """What the world answers; None: nothing happens to who leads or watches in peace."""
        lies = not self.is_calm and self.chance.random() < 0.2  # what is lost, or cut off
        latest = max(self.register, default=0)
        match doing:
            case Look() | Claim():
                if isinstance(doing, Claim) and not (lies and self.chance.random() < 0.5):
                    self.register.setdefault(doing.epoch, own)
                    latest = max(self.register)
                if lies:
                    return Unanswered()
                return Found(Term(latest, self.register[latest]) if latest else None)
            case Watch(term):
                leader = self.doing.get(term.leader)
                if leader is None or lies:
                    return Gone()
                return None if leader == Lead(term.epoch) else Deposed()
            case Lead(epoch):
                return Deposed() if lies or latest > epoch else None

    def leaders(self) -> list[int]:
        return [doing.epoch for doing in self.doing.values() if isinstance(doing, Lead)]


@pytest.mark.parametrize("seed", range(200))
def test_one_leads_in_an_epoch_and_one_in_the_end(seed: int) -> None:
    cluster = Cluster(seed)
    for _ in range(300):
        cluster.step()
    cluster.is_calm = True
    for _ in range(200):
        cluster.step()
    (epoch,) = cluster.leaders()
    assert epoch == max(cluster.register), f"seed {seed}"
