"""Every interleaving of a few actors on a tiny store, deaths included: nothing is left to chance.

Each actor has a program of at most six steps. From a state the explorer takes every step that some
actor can take next, and the death of each actor, and so on from there; a state that was seen
before, up to the names of claims and writes, is not entered again. After every step the store's own
invariants hold, every block that somebody holds has its bytes, and so has every block in the index;
when all have ended, nothing is held.

The bytes are a model's: ``memory[slot]`` is what was last written there. Writers scribble before
they fill, so a slot that two of them have at once shows.
"""

import contextlib
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile

from pdserve.errors import BlockMissing, CapacityError, FrameError, TicketGone
from pdserve.ids import BlockKey, RequestId, SlotId, TicketId
from pdserve.kvstore.answers import ClaimGrant, WriteGrant
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.slot_states import SlotState
from pdserve.kvstore.tickets import OwnerId
from tests.campaign.scenes import SCENES, STEPS_MAX, Scene, Step

FOREVER_NS = 1 << 62
NOBODY = OwnerId(0)
SCRIBBLE = b"half a block"

Pinned = tuple[SlotId, int, bytes]
"""A slot, its generation and what must be in it, of a block that a reader has found by itself."""


def keys_of(word: str) -> list[BlockKey]:
    """A key is the prefix itself."""
    return [BlockKey(word[:end].encode().ljust(16, b".")) for end in range(1, len(word) + 1)]


@dataclass
class Hand:
    """What one actor holds, as it knows it."""

    owner: OwnerId | None  # None: dead, or never there
    place: int = 0  # of its next step
    claims: list[tuple[ClaimGrant, list[bytes]]] = field(default_factory=list)
    write: WriteGrant | None = None
    contents: list[bytes] = field(default_factory=list)  # of the write's slots
    seen: list[Pinned] = field(default_factory=list)  # in the index, and not confirmed yet
    held: list[Pinned] = field(default_factory=list)  # confirmed, on its board


@dataclass
class Boards:
    """What readers on the node's host share with it: the index's marks, and a board for each."""

    marks: dict[SlotId, tuple[BlockKey, int]] = field(default_factory=dict)
    pins: dict[OwnerId, set[SlotId]] = field(default_factory=dict)

    def hide(self, slots: Sequence[SlotId]) -> Collection[SlotId]:
        for slot in slots:
            self.marks.pop(slot, None)
        return set(slots) & set().union(*self.pins.values())

    def changed(self) -> list[tuple[int, Sequence[SlotId]]]:
        return [(owner, sorted(slots)) for owner, slots in self.pins.items()]


@dataclass
class State:
    core: StoreCore
    hands: dict[str, Hand]
    boards: Boards
    memory: dict[SlotId, bytes] = field(default_factory=dict)
    handed: dict[str, list[bytes]] = field(default_factory=dict)  # ticket to what was pushed

    def seen_as(self) -> object:
        """Equal for states that cannot be told apart by what follows."""
        core = self.core
        slots = [core._slots[SlotId(index)] for index in range(core._slots.slot_count)]
        uses = sorted({slot.last_use for slot in slots})
        return (
            tuple(
                (
                    *(slot.state, slot.key, slot.parent, slot.children, slot.pins),
                    *(slot.generation, uses.index(slot.last_use)),
                )
                for slot in slots
            ),
            (tuple(core._slots._free), tuple(core._slots._draining)),
            tuple(sorted(self.memory.items())),
            tuple(sorted(self.boards.marks.items())),
            tuple(
                (
                    *(name, hand.owner is None, hand.place, hand.write and hand.write.slots),
                    *(hand.write and hand.write.first_index, tuple(hand.seen), tuple(hand.held)),
                    tuple(sorted(self.boards.pins.get(hand.owner or NOBODY, ()))),
                    tuple(
                        (grant.slots, core._owners[hand.owner].claims.get(grant.claim) is None)
                        for grant, _ in hand.claims
                        if hand.owner is not None
                    ),
                )
                for name, hand in self.hands.items()
            ),
            tuple(
                (
                    *(ticket.ticket, ticket.state, tuple(ticket.reserved), tuple(ticket.blocks)),
                    ticket.tail,
                )
                for ticket in core.tickets
            ),
            tuple(ticket.ticket for ticket in core.tickets._queue),
        )


def enter(state: State, name: str) -> None:
    owner = state.core.connect(name)
    state.hands[name] = Hand(owner)
    state.boards.pins[owner] = set()


def settle(state: State) -> None:
    """The index lists what the books have become."""
    for slot, record in state.core.take_changed_slots().items():
        state.boards.marks.pop(slot, None)
        if record.state is SlotState.COMMITTED and record.key is not None:
            state.boards.marks[slot] = record.key, record.generation


# ── steps ────────────────────────────────────────────────────────────────────────────────────────


def _claim(state: State, hand: Hand, owner: OwnerId, word: str) -> None:
    keys = keys_of(word)
    grant = state.core.claim(owner, keys)
    if grant.claim:
        hand.claims.append((grant, [bytes(key) for key in keys[: len(grant.slots)]]))


def _release(state: State, hand: Hand, owner: OwnerId) -> None:
    if hand.claims:
        grant, _ = hand.claims.pop(0)
        state.core.release(owner, grant.claim)


def _condemn(state: State, hand: Hand, owner: OwnerId) -> None:
    """The first block of the first claim is wrong."""
    if hand.claims:
        state.core.condemn(owner, hand.claims[0][0].claim, 0)


def _begin(state: State, hand: Hand, grant: WriteGrant, contents: Sequence[bytes]) -> None:
    if grant.write:
        hand.write = grant
        hand.contents = list(contents[: len(grant.slots)])
        for slot in grant.slots:
            state.memory[slot] = SCRIBBLE


def _reserve(state: State, hand: Hand, owner: OwnerId, word: str, first: str) -> None:
    keys = keys_of(word)
    grant = state.core.reserve(owner, keys, int(first))
    _begin(state, hand, grant, [bytes(key) for key in keys[grant.first_index :]])


def _open(state: State, hand: Hand, owner: OwnerId, ticket: str, reader: str, count: str) -> None:
    state.core.open_ticket(
        owner,
        TicketId(ticket),
        RequestId("r"),
        0,
        reader=reader,
        block_count=int(count),
        deadline_ns=FOREVER_NS,
    )


def _push(state: State, hand: Hand, owner: OwnerId, ticket: str, word: str) -> None:
    keys = keys_of(word)
    grant = state.core.reserve_push(owner, TicketId(ticket), keys, 0)
    state.handed[ticket] = [bytes(key) for key in keys]
    _begin(state, hand, grant, [bytes(key) for key in keys[grant.first_index :]])


def _tail(state: State, hand: Hand, owner: OwnerId, ticket: str) -> None:
    grant = state.core.reserve_tail(owner, TicketId(ticket))
    content = f"tail of {ticket}".encode()
    state.handed.setdefault(ticket, []).append(content)
    _begin(state, hand, grant, [content])


def _scribble(state: State, hand: Hand, owner: OwnerId) -> None:
    """The writer is still at it, whatever became of its ticket."""
    if hand.write is not None:
        for slot in hand.write.slots:
            state.memory[slot] = SCRIBBLE


def _commit(state: State, hand: Hand, owner: OwnerId) -> None:
    write, hand.write = hand.write, None
    if write is None:
        return
    for position, slot in enumerate(write.slots):
        state.memory[slot] = hand.contents[position]
        state.core.filled(owner, write.write, position, 7)
    state.core.commit(owner, write.write)


def _abandon(state: State, hand: Hand, owner: OwnerId) -> None:
    write, hand.write = hand.write, None
    if write is not None:
        state.core.abandon(owner, write.write)


def _adopt(state: State, hand: Hand, owner: OwnerId, ticket: str) -> None:
    grant = state.core.adopt(owner, TicketId(ticket))
    contents = state.handed.get(ticket, [])
    assert len(grant.slots) == len(contents), f"{len(grant.slots)} blocks of {len(contents)}"
    if grant.claim:
        hand.claims.append((grant, contents))


def _look(state: State, hand: Hand, owner: OwnerId, word: str) -> None:
    """For the longest prefix, without asking: what is found may go before it is pinned."""
    slot_of = {key: (slot, generation) for slot, (key, generation) in state.boards.marks.items()}
    for key in takewhile(slot_of.__contains__, keys_of(word)):
        hand.seen.append((*slot_of[key], bytes(key)))


def _pin(state: State, hand: Hand, owner: OwnerId) -> None:
    state.boards.pins[owner] |= {slot for slot, _, _ in hand.seen}


def _confirm(state: State, hand: Hand, owner: OwnerId) -> None:
    seen, hand.seen = hand.seen, []
    if all(state.boards.marks.get(slot) == (key, gen) for slot, gen, key in seen):
        hand.held += seen
    else:
        state.boards.pins[owner] = {slot for slot, _, _ in hand.held}


def _drop(state: State, hand: Hand, owner: OwnerId) -> None:
    hand.held.clear()
    state.boards.pins[owner].clear()
    state.core.room.let_go()


STEPS: Mapping[str, Callable[..., None]] = {
    "claim": _claim,
    "release": _release,
    "condemn": _condemn,
    "reserve": _reserve,
    "open": _open,
    "push": _push,
    "tail": _tail,
    "scribble": _scribble,
    "commit": _commit,
    "abandon": _abandon,
    "seal": lambda state, hand, owner, ticket: state.core.seal(owner, TicketId(ticket)),
    "abort": lambda state, hand, owner, ticket: state.core.abort(TicketId(ticket)),
    "adopt": _adopt,
    "look": _look,
    "pin": _pin,
    "confirm": _confirm,
    "drop": _drop,
}


def take(state: State, name: str, program: Sequence[Step]) -> None:
    """The actor's next step; a typed error is one of its outcomes."""
    hand = state.hands[name]
    assert hand.owner is not None
    what, *arguments = program[hand.place]
    hand.place += 1
    # Gone, full, or out of turn because an earlier step of its own came to nothing.
    with contextlib.suppress(TicketGone, CapacityError, FrameError):
        STEPS[what](state, hand, hand.owner, *arguments)
    settle(state)


def take_all(state: State, name: str, program: Sequence[Step]) -> None:
    """An actor that comes, takes all its steps, and goes."""
    enter(state, name)
    for _ in program:
        take(state, name, program)
    die(state, name)
    del state.hands[name]


def die(state: State, name: str) -> None:
    hand = state.hands[name]
    assert hand.owner is not None
    del state.boards.pins[hand.owner]
    state.core.disconnect(hand.owner)
    state.hands[name] = Hand(None)
    settle(state)


# ── what must hold ───────────────────────────────────────────────────────────────────────────────


def check(state: State) -> None:
    """After each step."""
    core = state.core
    core.check()
    for hand in state.hands.values():
        for grant, contents in hand.claims:
            _check_claim(state, hand, grant, contents)
        for pinned, _, content in hand.held:
            assert state.memory[pinned] == content, f"{content!r} is on a board"
    for key in core.changes(-1).added:
        slot = core._slots.find(key)
        assert slot is not None
        assert state.memory.get(slot) == key, f"{key!r} is found, and its bytes are not there"
        parent = keys_of(key.rstrip(b".").decode())[-2:-1]
        assert all(core._slots.find(each) is not None for each in parent), f"{key!r} is an orphan"
    stat = core.stat()
    by_state = stat.slots_free + stat.slots_reserved + stat.slots_committed
    by_state += stat.slots_private + stat.slots_quarantined + stat.slots_draining
    assert by_state == stat.slots_total


def _check_claim(state: State, hand: Hand, grant: ClaimGrant, contents: Sequence[bytes]) -> None:
    assert hand.owner is not None
    for index, content in enumerate(contents):
        try:
            slot, record = state.core.claimed(hand.owner, grant.claim, index)
        except BlockMissing:
            continue  # condemned, by whoever held it too
        assert (slot, record.generation) == (grant.slots[index], grant.generations[index])
        assert state.memory[slot] == content, f"{content!r} was promised"


def check_end(state: State) -> None:
    """When everybody has gone."""
    for name, hand in state.hands.items():
        if hand.owner is not None:
            die(state, name)
    check(state)
    stat = state.core.stat()
    assert stat.slots_free + stat.slots_committed == stat.slots_total, stat
    assert (stat.slots_pinned, stat.tickets, stat.claims, stat.writes) == (0, 0, 0, 0), stat


# ── exploring ────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Explored:
    states: int = 0
    steps: int = 0


def explore(scene: Scene, core_type: type[StoreCore] = StoreCore) -> Explored:
    """All of it. Raises AssertionError, with the way there, at the first step that breaks."""
    assert all(len(program) <= STEPS_MAX for program in scene.programs.values())
    boards = Boards()
    first = State(core_type(scene.slot_count, eviction="lru", readers=boards), {}, boards)
    for word in scene.stored:
        take_all(first, "before", (("reserve", word, "0"), ("commit",)))
    for name in scene.programs:
        enter(first, name)
    explored = Explored()
    seen = set()
    to_do: list[tuple[State, tuple[str, ...]]] = [(first, ())]
    while to_do:
        state, way = to_do.pop()
        moves = list(_moves(scene, state))
        explored.states += 1
        data = pickle.dumps(state, pickle.HIGHEST_PROTOCOL)  # a copy, several times as fast
        if not moves:
            _or_tell(check_end, state, scene, way)
        for move in moves:
            following = pickle.loads(data)
            _or_tell(move[1], following, scene, (*way, move[0]))
            explored.steps += 1
            mark = following.seen_as()
            if mark not in seen:
                seen.add(mark)
                to_do.append((following, (*way, move[0])))
    return explored


def _moves(scene: Scene, state: State) -> Iterator[tuple[str, Callable[[State], None]]]:
    """Each actor's next step, and its death; who is done may die, or stay for ever."""
    for name, program in scene.programs.items():
        hand = state.hands[name]
        if hand.owner is None:
            continue
        if hand.place < len(program):
            what = " ".join(program[hand.place])

            def step(state: State, name: str = name, program: Sequence[Step] = program) -> None:
                take(state, name, program)
                check(state)

            yield f"{name}: {what}", step

        def death(state: State, name: str = name) -> None:
            die(state, name)
            check(state)

        yield f"{name} dies", death


def _or_tell(move: Callable[[State], None], state: State, scene: Scene, way: Sequence[str]) -> None:
    try:
        move(state)
    except Exception as error:
        raise AssertionError(f"{scene.name}: {error!r} after: {'; '.join(way)}") from error


def explore_all(core_type: type[StoreCore] = StoreCore) -> Explored:
    parts = [explore(scene, core_type) for scene in SCENES]
    return Explored(sum(each.states for each in parts), sum(each.steps for each in parts))


assert {step[0] for scene in SCENES for step in chain(*scene.programs.values())} <= set(STEPS)
