"""The decode loop: takes sequences over from the store and gives each one token per step.

A hand-off brings token ids and a ticket. Its blocks are copied into the device pool by the mover,
except those that the pool has already (the choices of one call share their prompt's), and from
then on the sequence is one row of every step until it ends. Tokens go to the gateways as they are
drawn; the first, which prefill drew, goes out when the hand-off arrives, before its blocks do.

Out of blocks, the latest sequences are *parked*: their KV goes to the store under a new ticket that
anybody may adopt, and the router finds them a worker with room. A resumed sequence is a hand-off
like any other. Draining is parking everybody.

What a sequence leaves in full blocks is offered to the store when it ends, so that the next turn
of the conversation finds it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

from pdserve.clock import US, Clock, monotonic
from pdserve.config import PoolConfig, StoreConfig
from pdserve.decode.room import victims
from pdserve.decode.stream import Stage, Stream
from pdserve.engine.blocks import blocks_for
from pdserve.engine.device import Device
from pdserve.engine.mover import Mover
from pdserve.engine.moves import Abort, Adopt, Forsake, Moved, Park, Put
from pdserve.engine.outputs import GiveUp, Load, Output, ToGateway, ToRouter
from pdserve.engine.runner import Runner
from pdserve.engine.sayings import delta, failed, progress
from pdserve.engine.sequence import Sequence, stretch_us, unix_us
from pdserve.errors import OutOfBlocks, PdserveError, QueueFull
from pdserve.ids import BlockKey, RequestId, TicketId, WorkerId
from pdserve.lifecycle import Event
from pdserve.messages import (
    Cancel,
    Handoff,
    Parked,
    Progress,
    Resume,
    Token,
    WorkerFailed,
)
from pdserve.model.runner import Run
from pdserve.model.sampler import sample
from pdserve.text.tokenizer import Tokenizer

WAITING_MAX = 256
"""Hand-offs that wait for room. The router reserves before it dispatches, so few do."""

RETRY_AFTER_MS = 100


class DecodeLoop:
    def __init__(
        self,
        *,
        worker: WorkerId,
        runner: Runner,
        mover: Mover,
        tokenizer: Tokenizer,
        namespace: bytes,
        settings: PoolConfig,
        store: StoreConfig,
        clock: Clock = monotonic,
    ) -> None:
        self._worker = worker
        self._runner = runner
        self._mover = mover
        self._tokenizer = tokenizer
        self._namespace = namespace
        self._store = store
        self._clock = clock
        self._block_tokens = runner.pool.block_tokens
        self._running_max = settings.running_max
        self._device = Device(runner.pool.block_count, mover)
        self.pool = self._device.pool
        self._counters = self._device.counters
        self._streams: dict[RequestId, Stream] = {}  # in order of arrival
        self._outputs: list[Output] = []
        self._active = False
        self._draining = False

    # ── Loop ─────────────────────────────────────────────────────────────────────────────────────

    def handle(self, message: Handoff | Resume | Cancel | GiveUp) -> None:
        self._active = True
        match message:
            case Handoff():
                self._take(message)
            case Resume():
                self._counters["resumed"] += 1
                self._take(message.handoff)
            case Cancel():
                # One that overtook its hand-off finds nothing; the router, told that the request
                # was adopted, says it again.
                stream = self._streams.get(message.request)
                if stream and message.covers(stream.sequence.request.attempt):
                    self._let_go(stream)
            case GiveUp():
                self._give_up()
            case _:
                assert_never(message)

    def step(self) -> list[Output]:
        self._active = False
        for moved in self._device.collect():
            self._active = True
            self._on_moved(moved)
        self._adopt_waiting()
        self._generate()
        outputs, self._outputs = self._outputs, []
        return outputs

    def busy(self) -> bool:
        return self._active or bool(self._outputs) or self._mover.ready()

    def load(self) -> Load:
        waiting = sum(stream.stage is Stage.WAITING for stream in self._streams.values())
        return self._device.load(running=len(self._streams) - waiting, waiting=waiting)

    def drain(self) -> None:
        """Park everything; what is not here yet is adopted first, as room appears."""
        self._active = self._draining = True
        for stream in self._in_stage(Stage.RUNNING):
            self._park(stream)

    def wake_by(self, wake: Callable[[], None]) -> None:
        self._mover.wake = wake

    def close(self) -> None:
        self._mover.close()

    # ── taking over ──────────────────────────────────────────────────────────────────────────────

    def _take(self, handoff: Handoff) -> None:
        request = handoff.request
        earlier = self._streams.get(request.request)
        if earlier is not None:
            if earlier.sequence.request.attempt == request.attempt:
                return  # told twice
            if earlier.sequence.request.attempt > request.attempt:
                self._drop_ticket(handoff)
                return
            self._let_go(earlier)
        sequence = Sequence(
            request,
            handoff.route,
            handoff.tokens,
            replace(handoff.timing, decode=self._worker),
            keys=handoff.block_keys,
            namespace=self._namespace,
            tokenizer=self._tokenizer,
            block_tokens=self._block_tokens,
            context_tokens=self._runner.architecture.context_tokens,
        )
        if handoff.unsent or sequence.ending:
            self._note_takeover(sequence)
            self._say_tokens(sequence, handoff.unsent, timed=True)
        stream = Stream(sequence, handoff)
        self._streams[request.request] = stream
        block_count = blocks_for(len(handoff.tokens), self._block_tokens)
        if sequence.ending is not None:
            self._end(stream)
        elif block_count > self.pool.block_count:
            self._fail(stream, self._never_fits(block_count))
        elif len(self._in_stage(Stage.WAITING)) > WAITING_MAX:
            self._fail(
                stream,
                QueueFull(f"{WAITING_MAX} hand-offs wait already", retry_after_ms=RETRY_AFTER_MS),
            )

    def _adopt_waiting(self) -> None:
        """Begin to copy in the longest waiting, as many as have room."""
        loading = {key for stream in self._in_stage(Stage.ADOPTING) for key in self._keys(stream)}
        for stream in self._in_stage(Stage.WAITING):
            active = sum(s.stage in (Stage.ADOPTING, Stage.RUNNING) for s in self._streams.values())
            keys = self._keys(stream)
            missing = keys[self.pool.published(keys) :]
            if missing and missing[0] in loading:
                continue  # another choice of the same call is bringing it
            if active >= self._running_max or not self._adopt(stream, growth_blocks=active):
                return
            loading.update(missing)
            self._active = True

    def _adopt(self, stream: Stream, *, growth_blocks: int) -> bool:
        """False: no room. ``growth_blocks`` are left for those that run, one for each: who comes
        in on the last block would be the first to be parked."""
        sequence = stream.sequence
        held = self.pool.hold_published(self._keys(stream))
        kv_blocks = blocks_for(len(sequence.tokens) - 1, self._block_tokens)
        wanted = blocks_for(len(sequence.tokens), self._block_tokens) - len(held)
        if not self._device.room(wanted + growth_blocks):
            self.pool.release(held)
            return False
        sequence.blocks.extend(held + self.pool.take(wanted))
        stream.move_to(Stage.ADOPTING)
        fresh = sequence.blocks[len(held) : kv_blocks]
        handoff = stream.handoff
        self._device.submit(
            Adopt(handoff.store, handoff.ticket, (None,) * len(held) + tuple(fresh)), stream
        )
        return True

    def _on_moved(self, moved: Moved) -> None:
        stream = moved.owner
        if not isinstance(stream, Stream):
            return
        if isinstance(moved.move, Adopt) and stream.stage is Stage.ADOPTING:
            if moved.error is None:
                self._on_adopted(stream)
            else:
                self._fail(stream, moved.error)
        elif isinstance(moved.move, Park):
            self._on_parked(stream, moved.ticket, moved.error)

    def _on_adopted(self, stream: Stream) -> None:
        sequence = stream.sequence
        sequence.kv_count = len(sequence.tokens) - 1
        for key, block in zip(self._keys(stream), sequence.blocks, strict=False):
            self.pool.publish(key, block)
        stream.move_to(Stage.RUNNING)
        if stream.handoff.unsent:
            self._note_takeover(sequence)
        self._say(progress(sequence, Event.ADOPTED))
        if self._draining:
            self._park(stream)

    def _note_takeover(self, sequence: Sequence) -> None:
        """Time since prefill's first token, up to now; said again it only becomes larger."""
        timing = sequence.timing
        now_us = unix_us()
        sequence.timing = replace(
            timing,
            handoff_us=timing.handoff_us + stretch_us(timing, now_us),
            since_unix_us=now_us,
        )

    # ── generating ───────────────────────────────────────────────────────────────────────────────

    def _generate(self) -> None:
        """One forward pass: the next token of every running sequence."""
        streams = self._with_room()
        if not streams:
            return
        self._active = True
        began_ns = self._clock()
        sequences = [stream.sequence for stream in streams]
        logits = self._runner.step([self._run(sequence) for sequence in sequences])
        tokens = sample(logits, [sequence.sampler_row() for sequence in sequences])
        self._counters["steps"] += 1
        self._counters["tokens_generated"] += len(tokens)
        for stream, token in zip(streams, tokens, strict=True):
            self._on_token(stream, token)
        self._counters["step_us_total"] += (self._clock() - began_ns) // US

    def _run(self, sequence: Sequence) -> Run:
        return Run(
            tokens=sequence.tokens[-1:], start=len(sequence.tokens) - 1, blocks=sequence.blocks
        )

    def _on_token(self, stream: Stream, token: Token) -> None:
        sequence = stream.sequence
        position = sequence.kv_count
        if position < sequence.request.prompt_tokens:
            self._counters["prompt_tokens_computed"] += 1
        sequence.kv_count += 1
        if sequence.kv_count % self._block_tokens == 0:
            last = sequence.full_blocks - 1
            self.pool.publish(sequence.keys(last + 1)[last], sequence.blocks[last])
        sequence.accept(token)
        self._say_tokens(sequence, (token,), timed=sequence.ending is not None)
        if sequence.ending is not None:
            self._end(stream)

    # ── room ─────────────────────────────────────────────────────────────────────────────────────

    def _with_room(self) -> list[Stream]:
        """The running streams that have a place for their next token, oldest first.

        Where blocks are short, the latest are parked; who still lacks one skips steps until their
        blocks arrive.
        """
        running = self._in_stage(Stage.RUNNING)
        ready, shortfall = [], 0
        for stream in running:
            table, wanted = stream.sequence.table, len(stream.sequence.tokens)
            if table.blocks_needed(wanted) <= 0:
                ready.append(stream)
            elif blocks_for(wanted, self._block_tokens) > self.pool.block_count:
                error = self._never_fits(blocks_for(wanted, self._block_tokens))
                self._fail(stream, error)
            elif self._device.room(1):
                table.blocks.extend(self.pool.take(1))
                ready.append(stream)
            else:
                shortfall += 1
        shortfall -= sum(stream.leaving_blocks for stream in self._in_stage(Stage.PARKING))
        if shortfall <= 0:
            return ready
        running = self._in_stage(Stage.RUNNING)
        private = [self.pool.private_count(stream.sequence.blocks) for stream in running]
        leaving = victims(shortfall, private)
        for stream in running[len(running) - leaving :]:
            self._park(stream)
        return [stream for stream in ready if stream.stage is Stage.RUNNING]

    def _park(self, stream: Stream) -> None:
        self._active = True
        sequence, full = stream.sequence, stream.sequence.full_blocks
        request = sequence.request
        stream.leaving_blocks = self.pool.private_count(sequence.blocks)
        stream.move_to(Stage.PARKING)
        self._device.submit(
            Park(
                self._mover.local,
                request.request,
                request.attempt,
                sequence.keys(full),
                tuple(sequence.blocks[:full]),
                sequence.tail_block,
            ),
            stream,
        )
        self._release_blocks(stream)  # the move holds those that it reads

    def _on_parked(
        self, stream: Stream, ticket: TicketId | None, error: PdserveError | None
    ) -> None:
        if stream.stage is Stage.GONE:
            if ticket is not None:
                self._device.submit(Abort(self._mover.local, ticket))
            return
        if error is not None:
            self._fail(stream, error)
            return
        assert ticket is not None
        sequence = stream.sequence
        timing = sequence.timing
        handoff = replace(
            stream.handoff,
            ticket=ticket,
            store=self._mover.local,
            tokens=tuple(sequence.tokens),
            block_keys=sequence.keys(sequence.full_blocks),
            unsent=(),
            timing=replace(timing, parked_count=timing.parked_count + 1, since_unix_us=unix_us()),
        )
        self._counters["parked"] += 1
        self._say(Parked(handoff))
        self._forget(stream)

    # ── letting go ───────────────────────────────────────────────────────────────────────────────

    def _end(self, stream: Stream) -> None:
        self._say(progress(stream.sequence, Event.ENDED))
        self._offer_blocks(stream)
        self._let_go(stream)

    def _give_up(self) -> None:
        """What was parked ends too: its tickets are this worker's, and only the router that is gone
        knew them."""
        self._device.submit(Forsake(self._mover.local))
        for stream in list(self._streams.values()):
            if stream.stage is Stage.RUNNING:
                self._offer_blocks(stream)  # the next attempt finds them
            self._let_go(stream)

    def _offer_blocks(self, stream: Stream) -> None:
        sequence, full = stream.sequence, stream.sequence.full_blocks
        if self._store.offload and full:
            put = Put(self._mover.local, sequence.keys(full), tuple(sequence.blocks[:full]))
            self._device.offer(put)

    def _fail(self, stream: Stream, error: PdserveError) -> None:
        self._say(failed(stream.sequence, error))
        self._let_go(stream)

    def _let_go(self, stream: Stream) -> None:
        if stream.stage is Stage.WAITING:
            self._drop_ticket(stream.handoff)
        self._release_blocks(stream)
        self._forget(stream)

    def _release_blocks(self, stream: Stream) -> None:
        self.pool.release(stream.sequence.blocks)
        stream.sequence.blocks.clear()

    def _forget(self, stream: Stream) -> None:
        stream.move_to(Stage.GONE)
        del self._streams[stream.sequence.id]
        self._active = True  # whoever waits for room looks again

    def _drop_ticket(self, handoff: Handoff) -> None:
        """Nobody will read these blocks: the store need not keep them pinned."""
        self._device.submit(Abort(handoff.store, handoff.ticket))

    def _never_fits(self, block_count: int) -> OutOfBlocks:
        return OutOfBlocks(block_count, self.pool.block_count, retry_after_ms=RETRY_AFTER_MS)

    # ── saying ───────────────────────────────────────────────────────────────────────────────────

    def _say(self, message: Progress | WorkerFailed | Parked) -> None:
        self._outputs.append(ToRouter(message))

    def _say_tokens(self, sequence: Sequence, tokens: tuple[Token, ...], *, timed: bool) -> None:
        message = delta(sequence, tokens, timed=timed)
        self._outputs.append(ToGateway(sequence.request.reply_to, message))

    def _keys(self, stream: Stream) -> tuple[BlockKey, ...]:
        return stream.handoff.block_keys

    def _in_stage(self, stage: Stage) -> list[Stream]:
        return [stream for stream in self._streams.values() if stream.stage is stage]
