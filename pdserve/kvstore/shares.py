"""Whose blocks give way when an arena is full: weighted max-min shares of its slots.

Every slot in use is on the *account* of the tenant it was reserved for. A tenant's *share* is its
weight's part of the arena, among the tenants that have slots at that moment. Memory that nobody
wants may be used by anybody, far beyond a share; but once room is needed, a tenant above its share
gives way first, and of those the one that has most for its weight. So who floods the arena takes
what is free and then its own: a tenant at or below its share loses nothing while another above its
share has a block that may go. A put gets no more slots than that leaves; a hand-off, which
somebody waits for, gets all it needs. What results is the weighted max-min allocation: who wants
less than its share gets what it wants, and the others divide the rest by weight.

Which of a tenant's blocks goes is ``eviction``'s to say, as if the account were an arena of its
own; those with a soft pin go last. A share is the stronger of the two: soft pins of a tenant above
its share go before anything of one below.

Without weights all blocks compete alike, and accounts only count.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pdserve.ids import SlotId
from pdserve.kvstore.eviction import Eviction
from pdserve.kvstore.idle_leaves import IdleLeaves, IsCurrent, Worth
from pdserve.kvstore.slot_states import Past

ACCOUNTS_MAX = 128
"""Tenants with an account of their own. While so many have slots, further ones share one."""

TENANT_CHARS_MAX = 64
"""Of a tenant's name that are looked at."""

OTHERS = 0
"""The account of those who came when there were ``ACCOUNTS_MAX``."""

ANY_TENANT = "*"
"""In weights: who is not named there. And how the account of those without one is called."""


@dataclass(frozen=True, slots=True)
class TenantUse:
    """One account, at one moment."""

    tenant: str
    slots: int  # reserved or in use
    share: int  # of the slots, rounded down, among the tenants that have some now
    evicted_count: int  # since the tenant got its first slot


@dataclass(slots=True)
class _Account:
    tenant: str
    weight: float
    slots: int = 0
    evicted_count: int = 0

    @property
    def fullness(self) -> float:
        return self.slots / self.weight


class Accounts:
    """Invariant, asserted by ``check``: an account's slots are those assigned to it. Slots that
    are charged and not yet assigned exist only while a reservation is made."""

    def __init__(self, slot_count: int, weights: Mapping[str, float]) -> None:
        """``weights``: of named tenants, and of each other one under ``ANY_TENANT`` (else 1)."""
        self.slot_count = slot_count
        self._weights = weights
        self._of_slot = array("B", [OTHERS]) * slot_count
        others = _Account(ANY_TENANT, self._weight(ANY_TENANT))
        self._accounts: list[_Account | None] = [others] + [None] * ACCOUNTS_MAX
        self._numbers: dict[str, int] = {}
        self._unused = list(range(ACCOUNTS_MAX, 0, -1))
        self._weight_sum = 0.0  # of accounts with slots

    def charge(self, tenant: str, count: int) -> int:
        """The account of a tenant, with ``count`` slots more, which are to be assigned."""
        name = tenant[:TENANT_CHARS_MAX]
        number = self._numbers.get(name)
        if number is None and count:
            number = self._open(name)
        elif number is None:
            number = OTHERS
        account = self._account(number)
        was_empty = account.slots == 0
        account.slots += count
        if was_empty and count:
            self._sum_weights()
        return number

    def assign(self, slots: Iterable[SlotId], number: int) -> None:
        of_slot = self._of_slot
        for slot in slots:
            of_slot[slot] = number

    def inherit(self, slots: Sequence[SlotId]) -> None:
        """Slots in use of which nobody knows the tenant."""
        self._account(OTHERS).slots += len(slots)
        self.assign(slots, OTHERS)
        self._sum_weights()

    def freed(self, slot: SlotId) -> None:
        self.give_back(self._of_slot[slot], 1)

    def give_back(self, number: int, count: int) -> None:
        """``count`` slots fewer, which were charged."""
        account = self._account(number)
        account.slots -= count
        if account.slots == 0 and count:
            if number != OTHERS:
                self._accounts[number] = None
                del self._numbers[account.tenant]
                self._unused.append(number)
            self._sum_weights()

    def evicted(self, slot: SlotId) -> None:
        """It is freed because room was needed."""
        self._account(self._of_slot[slot]).evicted_count += 1

    def number_of(self, slot: SlotId) -> int:
        return self._of_slot[slot]

    def numbers_of(self, slots: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.frombuffer(self._of_slot, np.uint8).take(slots)

    def tenants(self) -> tuple[str, ...]:
        """By number; no name where there is no account of one tenant alone."""
        accounts = enumerate(self._accounts)
        return tuple(
            "" if each is None or number == OTHERS else each.tenant for number, each in accounts
        )

    def find(self, tenant: str) -> int | None:
        """The number of its own account; None where it has none."""
        return self._numbers.get(tenant[:TENANT_CHARS_MAX])

    def ranked(self) -> tuple[list[int], list[int]]:
        """Accounts above their share, and the others; in both, who has most for its weight first.
        Of equals the older account comes first."""
        above: list[tuple[float, int]] = []
        others: list[tuple[float, int]] = []
        fair = self.slot_count / self._weight_sum if self._weight_sum else 0.0
        for number, account in enumerate(self._accounts):
            if account is not None and account.slots:
                side = above if account.fullness > fair else others
                side.append((-account.fullness, number))
        return [number for _, number in sorted(above)], [number for _, number in sorted(others)]

    def reach(self, tenant: str) -> int:
        """Slots in use that a tenant's put may have: its own, and what others have beyond their
        shares. What is behind that are blocks of tenants within theirs."""
        number = self._numbers.get(tenant[:TENANT_CHARS_MAX])
        own = None if number is None else self._account(number)
        weight_sum = self._weight_sum + (self._weight(tenant) if own is None else 0.0)
        fair = self.slot_count / weight_sum
        others = (each for each in self._accounts if each is not None and each is not own)
        beyond = sum(max(0.0, account.slots - fair * account.weight) for account in others)
        return int(beyond) + (own.slots if own is not None else 0)

    def uses(self) -> Iterator[TenantUse]:
        """Of all with slots, the largest first."""
        found = [account for account in self._accounts if account is not None and account.slots]
        for account in sorted(found, key=lambda each: (-each.slots, each.tenant)):
            share = int(self.slot_count * account.weight / self._weight_sum)
            yield TenantUse(account.tenant, account.slots, share, account.evicted_count)

    def _open(self, name: str) -> int:
        if not self._unused:
            return OTHERS
        number = self._unused.pop()
        self._accounts[number] = _Account(name, self._weight(name))
        self._numbers[name] = number
        return number

    def _account(self, number: int) -> _Account:
        account = self._accounts[number]
        assert account is not None, f"account {number} is closed"
        return account

    def _weight(self, name: str) -> float:
        return self._weights.get(name, self._weights.get(ANY_TENANT, 1.0))

    def _sum_weights(self) -> None:
        used = (account for account in self._accounts if account is not None and account.slots)
        self._weight_sum = sum(account.weight for account in used)

    def check(self, is_free: Callable[[SlotId], bool]) -> None:
        """Assert the invariant. Linear in the arena; for tests."""
        slots = map(SlotId, range(self.slot_count))
        counts = [0] * len(self._accounts)
        for slot in slots:
            if not is_free(slot):
                counts[self._of_slot[slot]] += 1
        assert counts == [0 if each is None else each.slots for each in self._accounts]
        assert len(self._numbers) + len(self._unused) == ACCOUNTS_MAX


class EvictionOrder:
    """Which block of an arena is evicted next. Behind it stand one ``IdleLeaves`` per account, and
    one for its blocks with soft pins; those of an account that is empty are thrown away."""

    def __init__(
        self, eviction: Eviction, slot_count: int, weights: Mapping[str, float] | None = None
    ) -> None:
        self._eviction = eviction
        self._has_shares = bool(weights)
        self.accounts = Accounts(slot_count, weights or {})
        self.soft: dict[SlotId, int] = {}
        """Slots with a soft pin, and when that ends; ``PinBook``'s, but that it ends with the
        slot."""

        self._leaves: dict[tuple[int, bool], IdleLeaves] = {}

    def __len__(self) -> int:
        """Entries, those out of date included."""
        return sum(map(len, self._leaves.values()))

    def __contains__(self, leaf: tuple[SlotId, int, int]) -> bool:
        """Linear; for tests."""
        return leaf in self._leaves.get(self._place_of(leaf[0]), ())

    def add(self, slot: SlotId, turn: int, last_use: int, depth: int) -> None:
        self._leaves_of(self._place_of(slot)).add(slot, turn, last_use, depth)

    def clear(self) -> None:
        self._leaves.clear()

    def refill(
        self,
        slots: NDArray[np.int64],
        turns: NDArray[np.uint8],
        uses: NDArray[np.uint64],
        ranks: NDArray[np.uint64],
    ) -> None:
        """Forget all entries, and have one for each of these, with their ``rank_of``."""
        self.clear()
        accounts = self.accounts.numbers_of(slots) if self._has_shares else np.zeros_like(slots)
        is_soft = np.isin(slots, list(self.soft)) if self.soft else np.zeros(len(slots), np.bool_)
        # Of one place and turn, in one number.
        groups = (accounts.astype(np.int64) << 9) | (is_soft.astype(np.int64) << 8) | turns
        for group in np.unique(groups).tolist():
            chosen = groups == group
            place = group >> 9, bool(group >> 8 & 1)
            self._leaves_of(place).fill(group & 0xFF, uses[chosen], ranks[chosen])

    def take(self, now: int, is_current: IsCurrent) -> SlotId:
        """The block that goes first. ``is_current`` as for ``IdleLeaves``."""
        if not self._has_shares and not self.soft:  # the usual case, where all are in one place
            leaves = self._leaves.get((OTHERS, False))
            slot = None if leaves is None else leaves.take(now, is_current)
            assert slot is not None, "nothing can be evicted"
            self.accounts.evicted(slot)
            return slot
        groups = self.accounts.ranked() if self._has_shares else ([OTHERS],)
        for numbers in groups:
            for is_soft in (False, True):
                for number in numbers:
                    slot = self._take_of((number, is_soft), now, is_current)
                    if slot is not None:
                        self.accounts.evicted(slot)
                        return slot
        raise AssertionError("nothing can be evicted")

    def first_below(
        self, worth: Worth, account: int, now: int, is_current: IsCurrent
    ) -> SlotId | None:
        """The block that may give way first to one of an account that is worth so much, and is
        worth less: of a tenant above its share, or of the same account. None with a soft pin."""
        numbers = [OTHERS]
        if self._has_shares:
            above, _ = self.accounts.ranked()
            numbers = list(dict.fromkeys([*above, account]))
        for number in numbers:
            place = (number, False)
            leaves = self._leaves.get(place)
            if leaves is None:
                continue
            found = leaves.first(now, self._current_at(place, is_current))
            if found is not None and found[0] < worth:
                return found[1]
        return None

    def worth_of(self, past: Past, now: int) -> Worth:
        return self._eviction.worth(past.turn, now - past.last_use), past.last_use

    def reach(self, tenant: str) -> int:
        """Slots in use that may be evicted for a put, as far as shares have a say."""
        return self.accounts.reach(tenant) if self._has_shares else self.accounts.slot_count

    def freed(self, slot: SlotId) -> None:
        """It is nobody's any more."""
        if self.soft:
            self.soft.pop(slot, None)
        self.accounts.freed(slot)

    def _take_of(
        self,
        place: tuple[int, bool],
        now: int,
        is_current: IsCurrent,
    ) -> SlotId | None:
        leaves = self._leaves.get(place)
        if leaves is None:
            return None
        slot = leaves.take(now, self._current_at(place, is_current))
        if slot is None:
            del self._leaves[place]
        return slot

    def _current_at(self, place: tuple[int, bool], is_current: IsCurrent) -> IsCurrent:
        """A pin that came or ended, or a new owner, may have put a slot in another place since."""

        def is_here(slot: SlotId, turn: int, last_use: int) -> bool:
            return self._place_of(slot) == place and is_current(slot, turn, last_use)

        return is_here

    def _leaves_of(self, place: tuple[int, bool]) -> IdleLeaves:
        leaves = self._leaves.get(place)
        if leaves is None:
            leaves = self._leaves[place] = IdleLeaves(self._eviction)
        return leaves

    def _place_of(self, slot: SlotId) -> tuple[int, bool]:
        account = self.accounts.number_of(slot) if self._has_shares else OTHERS
        return account, slot in self.soft
