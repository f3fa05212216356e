"""Stand-ins for the runner, its pool and the store, for tests of the loops.

The fake model is honest about KV: a token leaves 8 bytes in its block that name token and position,
and the logits are a hash of all of a sequence's bytes as they lie in the pool. So one block that is
missing, swapped or somebody else's changes every token after it.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel

from pdserve.engine.moves import ANY_READER
from pdserve.errors import BlockMissing, ChecksumMismatch, OutOfBlocks, StoreUnavailable, TicketGone
from pdserve.ids import BlockKey, HostId, RequestId, TicketId
from pdserve.kvstore.answers import PrefixQuote
from pdserve.kvstore.path_speed import PathCost
from pdserve.messages import Address
from pdserve.model.ops import LayersTold
from pdserve.model.pool import Direct
from pdserve.model.runner import Run
from pdserve.text.tokenizer import Tokenizer

BLOCK_TOKENS = 4
ENTRY_BYTES = 8
BLOCK_BYTES = BLOCK_TOKENS * ENTRY_BYTES
LAYER_COUNT = 2  # what the first half of a block's tokens leave is its first layer
LAYER_BYTES = BLOCK_BYTES // LAYER_COUNT
VOCABULARY = 26
HIDDEN = 8
EOS = 25  # the letter z
ADAPTERS = ("aa", "bb")  # digests of those that a fake model has


def address(name: str) -> Address:
    return Address(HostId(name), f"/{name}", "")


def letters() -> Tokenizer:
    """Token i is the i-th letter; the last, z, ends a request."""
    vocabulary = {chr(ord("a") + token): token for token in range(VOCABULARY)}
    hf = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="a"))
    hf.decoder = ByteLevel()
    return Tokenizer(hf, eos_token_ids=(EOS,), bos_token_id=None, chat_template=None)


def entry(token: int, position: int, adapter: str = "") -> bytes:
    """Of an adapter another than of the base model."""
    salt = ("", *ADAPTERS).index(adapter) << 16
    return token.to_bytes(4, "little") + (position + salt).to_bytes(4, "little")


class FakePool(Direct):
    def __init__(self, block_count: int) -> None:
        self.block_count = block_count
        self.block_tokens = BLOCK_TOKENS
        self.block_bytes = BLOCK_BYTES
        self.layer_bytes = LAYER_BYTES
        self.data = [bytearray(BLOCK_BYTES) for _ in range(block_count)]

    def read_block(self, block: int, out: memoryview) -> None:
        out[:] = self.data[block]

    def await_layers(self, done: object) -> None:
        assert done is None

    def read_layers(self, block: int, first: int, end: int, out: memoryview) -> None:
        out[:] = self.data[block][first * LAYER_BYTES : end * LAYER_BYTES]

    def write_block(self, block: int, data: memoryview) -> None:
        self.data[block][:] = data

    def copy_block(self, source: int, target: int) -> None:
        self.data[target][:] = self.data[source]


@dataclass(frozen=True)
class FakeArchitecture:
    context_tokens: int = 400
    layer_count: int = LAYER_COUNT
    attention_like_linear_tokens: int = 1 << 30


class FakeRunner:
    def __init__(
        self,
        block_count: int = 64,
        *,
        habit: float = 0.0,
        adapters: Collection[str] = ADAPTERS,
    ) -> None:
        self.adapters = adapters
        self.habit = habit
        self.architecture = FakeArchitecture()
        self.pool = FakePool(block_count)
        self.steps: list[list[int]] = []  # tokens of each run of each step
        self.fed_steps = 0  # whose tokens the host did not know

    @property
    def computed_tokens(self) -> int:
        return sum(map(sum, self.steps))

    def step(
        self,
        runs: Sequence[Run],
        drawn_R: torch.Tensor | None = None,
        told: LayersTold | None = None,
    ) -> torch.Tensor:
        if drawn_R is not None:
            self.fed_steps += 1
            drawn = zip(runs, drawn_R.tolist(), strict=True)
            runs = [replace(run, tokens=(token,)) for run, token in drawn]
        self.steps.append([len(run.tokens) for run in runs])
        for layer in range(LAYER_COUNT):
            for run in runs:
                self._write(run, layer)
            if told is not None and told.is_due(layer + 1, LAYER_COUNT):
                told.tell(layer + 1, None)
        for run in runs:
            self._read(run)
        rows = [row for run in runs for row in self._logits(run, run.logits_count)]
        return torch.from_numpy(np.stack(rows)) if rows else torch.empty((0, VOCABULARY))

    def _write(self, run: Run, layer: int) -> None:
        for position, token in enumerate(run.tokens, run.start):
            index, offset = divmod(position, BLOCK_TOKENS)
            start = offset * ENTRY_BYTES
            if start // LAYER_BYTES == layer:
                written = entry(token, position, run.adapter)
                self.pool.data[run.blocks[index]][start : start + ENTRY_BYTES] = written

    def _read(self, run: Run) -> None:
        """A hidden state is the first of a row's logits; of those come three rows at once."""
        if run.reader is None:
            return
        logits_NV = torch.from_numpy(np.stack(self._logits(run, len(run.tokens))))
        if run.reader.hidden is not None:
            run.reader.hidden(logits_NV[:, :HIDDEN])
        if run.reader.logits is not None:
            for part_MV in torch.split(logits_NV, 3):
                run.reader.logits(part_MV)

    def _logits(self, run: Run, wanted: int) -> list[NDArray[np.float32]]:
        kv = b"".join(bytes(self.pool.data[block]) for block in run.blocks)
        end = run.start + len(run.tokens)
        return [
            logits_of(kv[: (count + 1) * ENTRY_BYTES], habit=self.habit)
            for count in range(end - wanted, end)
        ]


def logits_of(kv: bytes, *, habit: float = 0.0) -> NDArray[np.float32]:
    """``habit`` is added to one letter's logit that depends on the last letter alone. With about 3,
    a text goes round in circles and leaves them where the hash of everything so decides."""
    digest = hashlib.blake2b(kv, digest_size=64).digest()
    numbers = np.frombuffer(digest[: 2 * VOCABULARY], dtype=np.uint16)
    logits = numbers.astype(np.float32) / np.float32(16384)
    last = int.from_bytes(kv[-ENTRY_BYTES:][:4], "little")
    logits[(7 * last + 3) % 5] += np.float32(habit)
    return logits


@dataclass
class FakeClaim:
    blocks: list[bytes]
    keys: list[BlockKey | None]

    has_tail: bool = False

    @property
    def count(self) -> int:
        return len(self.blocks) - self.has_tail


@dataclass
class FakeWrite:
    """Of blocks whose bytes come in pieces; with ``keys`` None a ticket's tail."""

    ticket: TicketId
    keys: Sequence[BlockKey] | None
    first: int
    pieces: dict[int, bytearray]

    @property
    def indices(self) -> range:
        return range(self.first, self.first + len(self.pieces))

    def next_pieces(self, count: int) -> list[tuple[int, memoryview]]:
        return [(index, memoryview(bytearray(count))) for index in self.indices]

    def add(self, index: int, count: int, fill: Callable[[memoryview], None]) -> None:
        piece = bytearray(count)
        fill(memoryview(piece))
        self.pieces[index] += piece


@dataclass
class FakeTicket:
    request: RequestId
    attempt: int
    reader: str
    block_count: int
    keys: list[BlockKey] = field(default_factory=list)
    tail: bytes | None = None
    sealed: bool = False


def _pieces(indices: range) -> dict[int, bytearray]:
    return {index: bytearray() for index in indices}


class FakeStore:
    """A store node and everybody's client of it, in one: blocks, claims and tickets in dicts."""

    def __init__(self, slot_count: int = 1000) -> None:
        self.slot_count = slot_count
        self.blocks: dict[BlockKey, bytes] = {}
        self.tickets: dict[TicketId, FakeTicket] = {}
        self.claims: list[FakeClaim] = []
        self.bad: set[BlockKey] = set()  # these fail their checksum
        self.below: PathCost | None = None  # of its disk
        self.below_keys: set[BlockKey] = set()  # these are there alone
        self.down = False
        self.full = False  # tickets find no slots
        self.takes_pieces = True
        self.writes: list[FakeWrite] = []  # that are open
        self.finished = 0  # of those
        self.calls: deque[str] = deque()
        self.tenants: set[str] = set()  # on whose account something was asked or stored
        self.counters: Counter[str] = Counter()
        self._next_ticket = 0

    @property
    def has_disk(self) -> bool:
        return self.below is not None

    def memory(self) -> Sequence[memoryview]:
        return ()

    def quote(self, keys: Sequence[BlockKey]) -> PrefixQuote:
        self._called("quote")
        assert self.below is not None
        stored = list(takewhile(self.blocks.__contains__, keys))
        in_arena = list(takewhile(lambda key: key not in self.below_keys, stored))
        return PrefixQuote(len(in_arena), len(stored), self.below.fixed_s, self.below.bytes_per_s)

    def claim(self, keys: Sequence[BlockKey], *, fetch: bool = True, tenant: str = "") -> FakeClaim:
        self._called("claim")
        self.tenants.add(tenant)
        present = []
        for key in keys:
            if key not in self.blocks or (key in self.below_keys and not fetch):
                break
            self.below_keys.discard(key)
            present.append(key)
        claim = FakeClaim([self.blocks[key] for key in present], list(present))
        self.claims.append(claim)
        return claim

    def read_each(
        self, claim: FakeClaim, indices: Sequence[int], take: Callable[[int, memoryview], None]
    ) -> None:
        for position, index in enumerate(indices):
            self._called("read")
            key = claim.keys[index]
            if key is not None and key in self.bad:
                self.counters["checksum_failures"] += 1
                raise ChecksumMismatch("bytes and checksum differ")
            take(position, memoryview(claim.blocks[index]))
            self.counters["blocks_restored"] += 1

    def release(self, claim: FakeClaim) -> None:
        if claim in self.claims:
            self.claims.remove(claim)

    def put(
        self,
        keys: Sequence[BlockKey],
        first: int,
        fill: Callable[[int, memoryview], None],
        *,
        tenant: str,
    ) -> int:
        self._called("put")
        self.tenants.add(tenant)
        stored = 0
        for index in range(first, len(keys)):
            if keys[index] not in self.blocks and len(self.blocks) >= self.slot_count:
                break
            self._store(keys, index, fill)
            stored += 1
        return stored

    def open_ticket(
        self,
        request: RequestId,
        attempt: int,
        *,
        reader: str,
        block_count: int,
        wait_ms: int,
        tenant: str,
    ) -> TicketId:
        self._called("open_ticket")
        self.tenants.add(tenant)
        if self.full:
            raise OutOfBlocks(block_count, 0, retry_after_ms=1)
        self._next_ticket += 1
        ticket = TicketId(f"t{self._next_ticket}")
        self.tickets[ticket] = FakeTicket(request, attempt, reader, block_count)
        return ticket

    def push(
        self,
        ticket: TicketId,
        keys: Sequence[BlockKey],
        first: int,
        fill: Callable[[int, memoryview], None],
    ) -> None:
        self._called("push")
        record = self._ticket(ticket)
        assert not record.sealed
        assert len(record.keys) == first, "pushes must be gapless"
        for index in range(first, len(keys)):
            self._store(keys, index, fill)
        record.keys = list(keys)
        assert len(record.keys) <= record.block_count

    def push_tail(self, ticket: TicketId, fill: Callable[[memoryview], None]) -> None:
        self._called("push_tail")
        data = bytearray(BLOCK_BYTES)
        fill(memoryview(data))
        self._ticket(ticket).tail = bytes(data)

    def begin_push(
        self, ticket: TicketId, keys: Sequence[BlockKey], first: int
    ) -> FakeWrite | None:
        self._called("begin_push")
        assert len(self._ticket(ticket).keys) == first, "pushes must be gapless"
        return self._begin(FakeWrite(ticket, keys, first, _pieces(range(first, len(keys)))))

    def begin_tail(self, ticket: TicketId) -> FakeWrite | None:
        self._called("begin_tail")
        self._ticket(ticket)
        return self._begin(FakeWrite(ticket, None, 0, _pieces(range(1))))

    def _begin(self, write: FakeWrite) -> FakeWrite | None:
        if not self.takes_pieces:
            return None
        self.writes.append(write)
        return write

    def finish(self, write: FakeWrite) -> None:
        self._called("finish")

        def fill(index: int, out: memoryview) -> None:
            out[:] = write.pieces[index]

        if write.keys is None:
            self.push_tail(write.ticket, partial(fill, 0))
        else:
            self.push(write.ticket, write.keys, write.first, fill)
        self.writes.remove(write)
        self.finished += 1

    def give_up(self, write: FakeWrite) -> None:
        self.writes.remove(write)

    def seal(self, ticket: TicketId) -> None:
        self._called("seal")
        record = self._ticket(ticket)
        assert len(record.keys) + (record.tail is not None) == record.block_count
        record.sealed = True

    def abort(self, ticket: TicketId) -> None:
        self._called("abort")
        self.tickets.pop(ticket, None)

    def abort_attempts(self, request: RequestId, attempt: int | None) -> None:
        self._called("abort_attempts")
        for ticket, record in list(self.tickets.items()):
            told = record.reader == ANY_READER  # of those somebody always knows
            covered = attempt is None or record.attempt <= attempt
            if record.request == request and covered and not told:
                del self.tickets[ticket]

    def adopt(self, ticket: TicketId) -> FakeClaim:
        self._called("adopt")
        record = self._ticket(ticket)
        assert record.sealed
        if not all(key in self.blocks for key in record.keys):
            raise BlockMissing("a block of the ticket is gone")
        del self.tickets[ticket]
        keys: list[BlockKey | None] = [*record.keys]
        blocks = [self.blocks[key] for key in record.keys]
        if record.tail is not None:
            keys.append(None)
            blocks.append(record.tail)
        claim = FakeClaim(blocks, keys, has_tail=record.tail is not None)
        self.claims.append(claim)
        return claim

    def close(self) -> None:
        """What was parked is its writer's until somebody adopts it."""
        self.calls.append("close")
        self.tickets = {t: each for t, each in self.tickets.items() if each.reader != ANY_READER}

    def check_idle(self) -> None:
        assert not self.tickets
        assert not self.claims
        assert not self.writes

    def _store(
        self, keys: Sequence[BlockKey], index: int, fill: Callable[[int, memoryview], None]
    ) -> None:
        if keys[index] in self.blocks:
            return
        data = bytearray(BLOCK_BYTES)
        fill(index, memoryview(data))
        self.blocks[keys[index]] = bytes(data)
        self.counters["blocks_put"] += 1

    def _ticket(self, ticket: TicketId) -> FakeTicket:
        if ticket not in self.tickets:
            raise TicketGone(f"no ticket {ticket}")
        return self.tickets[ticket]

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.down:
            raise StoreUnavailable("the store is down")
