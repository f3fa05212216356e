"""Sequences whose prompts are computed, each given one token per step.

A hand-off brings token ids and a ticket. Its blocks are copied into the device pool by the mover,
except those that the pool has already (the choices of one call share their prompt's), and from
then on the sequence is one row of every step until it ends. Tokens go to the gateways as they are
drawn; the first, which prefill drew, goes out when the hand-off arrives, before its blocks do.
A sequence whose prompt was computed on this worker is *kept*: it runs on with the blocks it has.

Out of blocks, the latest sequences are *parked*: their KV goes to the store under a new ticket that
anybody may adopt, and the router finds them a worker with room; or the router asks for it, because
another should run. A resumed sequence is a hand-off like any other. Draining is parking everybody.

With speculation a sequence is one row and one more for each draft, and gets as many tokens as turn
out to be those that plain steps would have drawn. KV counts only for these (``kv_count``); what a
wrong draft left behind it is never in a full block, and the next step writes over it.

What a sequence leaves in full blocks is offered to the store when it ends, so that the next turn
of the conversation finds it.
"""

from collections.abc import Sequence as Tokens
from dataclasses import replace
from functools import partial

from pdserve.decode.room import victims
from pdserve.decode.speculation import Drafting, Speculation
from pdserve.decode.stream import Stage, Stream
from pdserve.engine.loop import Share, StepTime
from pdserve.engine.moves import Abort, Adopt, Forsake, Moved, Park
from pdserve.engine.sayings import progress
from pdserve.engine.sequence import Sequence, stretch_us, unix_us
from pdserve.engine.workplace import RETRY_AFTER_MS, Workplace
from pdserve.errors import PdserveError, QueueFull
from pdserve.ids import RequestId, TicketId
from pdserve.lifecycle import Event
from pdserve.messages import Attained, Cancel, Handoff, Parked, Token
from pdserve.model.runner import Run

WAITING_MAX = 256
"""Hand-offs that wait for room. The router reserves before it dispatches, so few do."""


class Streams:
    def __init__(self, workplace: Workplace, speculation: Speculation | None = None) -> None:
        self._workplace = workplace
        self._speculation = speculation
        self._device = workplace.device
        self._pool = workplace.pool
        self._counters = workplace.counters
        self._block_tokens = workplace.block_tokens
        self._streams: dict[RequestId, Stream] = {}  # in order of arrival
        self._draining = False

    # ── Part ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def held(self) -> int:
        return len(self._streams)

    @property
    def waiting(self) -> int:
        return sum(stream.stage is Stage.WAITING for stream in self._streams.values())

    @property
    def growing(self) -> int:
        begun = (Stage.ADOPTING, Stage.RUNNING)
        return sum(stream.stage in begun for stream in self._streams.values())

    def attempt_of(self, request: RequestId) -> int | None:
        stream = self._streams.get(request)
        return stream.sequence.request.attempt if stream else None

    def preempt(self, request: RequestId, attempt: int) -> None:
        stream = self._streams.get(request)
        if (
            stream is not None
            and stream.stage is Stage.RUNNING
            and stream.sequence.request.attempt == attempt
        ):
            self._park(stream)

    def cancel(self, cancel: Cancel) -> None:
        stream = self._streams.get(cancel.request)
        if stream and cancel.covers(stream.sequence.request.attempt):
            self._let_go(stream)

    def give_up(self) -> None:
        """What was parked ends too: its tickets are this worker's, and only the router that is gone
        knew them."""
        self._device.submit(Forsake(self._workplace.local))
        for stream in list(self._streams.values()):
            if stream.stage is Stage.RUNNING:
                self._workplace.offer_blocks(stream.sequence)  # the next attempt finds them
            self._let_go(stream)

    def drain(self) -> None:
        """Park everything; what is not here yet is adopted first, as room appears."""
        self._draining = True
        for stream in self._in_stage(Stage.RUNNING):
            self._park(stream)

    def attained(self) -> tuple[Attained, ...]:
        return tuple(
            Attained(sequence.id, sequence.request.attempt, sequence.generated_count)
            for sequence in (stream.sequence for stream in self._in_stage(Stage.RUNNING))
        )

    # ── taking over ──────────────────────────────────────────────────────────────────────────────

    def take(self, handoff: Handoff) -> None:
        request = handoff.request
        sequence = self._workplace.sequence(
            request,
            handoff.route,
            handoff.tokens,
            replace(handoff.timing, decode=self._workplace.worker),
            handoff.block_keys,
        )
        if handoff.unsent or sequence.ending:
            self._note_takeover(sequence)
            self._workplace.say_tokens(sequence, handoff.unsent, timed=True)
        too_many = self.waiting >= WAITING_MAX
        stream = Stream(sequence, handoff)
        self._streams[request.request] = stream
        too_large = self._workplace.never_fits(self._workplace.blocks_for(handoff.length))
        if sequence.ending is not None:
            self._end(stream)
        elif too_large is not None:
            self._fail(stream, too_large)
        elif too_many:
            self._fail(
                stream,
                QueueFull(f"{WAITING_MAX} hand-offs wait already", retry_after_ms=RETRY_AFTER_MS),
            )

    def refuse(self, handoff: Handoff) -> None:
        """Nobody will read these blocks: the store need not keep them pinned."""
        self._device.submit(Abort(handoff.store, handoff.ticket))

    def keep(self, sequence: Sequence, token: Token) -> None:
        """Go on with a sequence whose prompt was computed here, and whose first token this is."""
        sequence.timing = replace(sequence.timing, decode=self._workplace.worker)
        stream = Stream(sequence, None, Stage.RUNNING)
        self._streams[sequence.id] = stream
        self._workplace.say_tokens(sequence, (token,), timed=True)
        self._workplace.say(progress(sequence, Event.ADOPTED))
        if self._draining:
            self._park(stream)

    def begin(self, slots: int, growing: int) -> None:
        """Begin to copy in the longest waiting."""
        loading = {key for stream in self._in_stage(Stage.ADOPTING) for key in stream.keys}
        for stream in self._in_stage(Stage.WAITING):
            missing = stream.keys[self._pool.published(stream.keys) :]
            if missing and missing[0] in loading:
                continue  # another choice of the same call is bringing it
            if slots == 0 or not self._adopt(stream, growth_blocks=growing):
                return
            slots, growing = slots - 1, growing + 1
            loading.update(missing)
            self._workplace.stirred = True

    def _adopt(self, stream: Stream, *, growth_blocks: int) -> bool:
        """False: no room. ``growth_blocks`` are left for those that run, one for each: who comes
        in on the last block would be the first to be parked."""
        sequence, handoff = stream.sequence, stream.handoff
        assert handoff is not None, "a kept stream has its blocks"
        held = self._pool.hold_published(stream.keys)
        kv_blocks = self._workplace.blocks_for(len(sequence.tokens) - 1)
        wanted = self._workplace.blocks_for(len(sequence.tokens)) - len(held)
        if not self._device.room(wanted + growth_blocks):
            self._pool.release(held)
            return False
        sequence.blocks.extend(held + self._pool.take(wanted))
        stream.move_to(Stage.ADOPTING)
        fresh = sequence.blocks[len(held) : kv_blocks]
        self._device.submit(
            Adopt(handoff.store, handoff.ticket, (None,) * len(held) + tuple(fresh)), stream
        )
        return True

    def on_moved(self, moved: Moved) -> None:
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
        for key, block in zip(stream.keys, sequence.blocks, strict=False):
            self._pool.publish(key, block)
        stream.move_to(Stage.RUNNING)
        if stream.handoff and stream.handoff.unsent:
            self._note_takeover(sequence)
        self._workplace.say(progress(sequence, Event.ADOPTED))
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

    def share(self, growing: int) -> Share | None:
        """The next token of everything that runs, and more where drafts are worth it."""
        streams = self._with_room()
        if not streams:
            return None
        drafted = list(zip(streams, self._drafts(streams, growing), strict=True))
        return Share(
            runs=[self._run(stream.sequence, drafts) for stream, drafts in drafted],
            rows=(
                stream.sequence.sampler_row(drafts[:count])
                for stream, drafts in drafted
                for count in range(len(drafts) + 1)
            ),
            on_done=partial(self._on_step, drafted),
        )

    def _on_step(
        self, drafted: list[tuple[Stream, list[int]]], drawn: Tokens[Token], time: StepTime
    ) -> int:
        if self._speculation is not None and not time.shared:
            self._speculation.took(len(drawn), time.elapsed_us)
        first = generated = 0
        for stream, drafts in drafted:
            end = first + 1 + len(drafts)
            generated += self._on_drawn(stream, drafts, drawn[first:end])
            first = end
        return generated

    def _run(self, sequence: Sequence, drafts: list[int]) -> Run:
        return Run(
            tokens=[sequence.tokens[-1], *drafts],
            start=len(sequence.tokens) - 1,
            blocks=sequence.blocks,
            draft_count=len(drafts),
        )

    def _on_drawn(self, stream: Stream, drafts: list[int], drawn: Tokens[Token]) -> int:
        """Take the tokens up to the first that is not its draft, which is as good as any: all that
        it was drawn after is true."""
        sequence = stream.sequence
        tokens: list[Token] = []
        for token, draft in zip(drawn, (*drafts, None), strict=True):
            self._on_token(sequence, token)
            tokens.append(token)
            if token.token != draft or sequence.ending is not None:
                break
        self._counters["tokens_drafted"] += len(drafts)
        self._counters["tokens_accepted"] += sum(
            token.token == draft for token, draft in zip(tokens, drafts, strict=False)
        )
        if self._speculation is not None and stream.drafting is not None:
            self._speculation.came(stream.drafting, [token.token for token in tokens])
        self._workplace.say_tokens(sequence, tuple(tokens), timed=sequence.ending is not None)
        if sequence.ending is not None:
            self._end(stream)
        return len(tokens)

    def _on_token(self, sequence: Sequence, token: Token) -> None:
        position = sequence.kv_count
        if position < sequence.request.prompt_tokens:
            self._counters["prompt_tokens_computed"] += 1
        sequence.kv_count += 1
        if sequence.kv_count % self._block_tokens == 0:
            last = sequence.full_blocks - 1
            self._pool.publish(sequence.keys(last + 1)[last], sequence.blocks[last])
        sequence.accept(token)

    # ── drafts ───────────────────────────────────────────────────────────────────────────────────

    def _drafts(self, streams: list[Stream], growing: int) -> list[list[int]]:
        """For each stream, what its step computes beyond the next token; the blocks are taken."""
        if self._speculation is None:
            return [[] for _ in streams]
        # Who grows finds a block in the next step: no draft has somebody parked for it.
        spare = max(0, self._pool.free_count - growing)
        rooms = [self._room_tokens(stream, spare) for stream in streams]
        texts = [(self._drafting(stream), stream.sequence.tokens) for stream in streams]
        chosen = self._speculation.choose(texts, rooms)
        for stream, drafts in zip(streams, chosen, strict=True):
            del drafts[self._room_tokens(stream, spare) :]
            table = stream.sequence.table
            missing = max(0, table.blocks_needed(len(stream.sequence.tokens) + len(drafts)))
            table.blocks.extend(self._pool.take(missing))
            spare -= missing
        return chosen

    def _room_tokens(self, stream: Stream, spare_blocks: int) -> int:
        """How many drafts there is room for, in KV blocks and before the last token."""
        sequence = stream.sequence
        block_count = len(sequence.blocks) + spare_blocks
        return min(
            block_count * self._block_tokens - len(sequence.tokens), sequence.tokens_left - 1
        )

    def _drafting(self, stream: Stream) -> Drafting:
        assert self._speculation is not None
        if stream.drafting is None:
            stream.drafting = self._speculation.begin()
        return stream.drafting

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
            elif error := self._workplace.never_fits(self._workplace.blocks_for(wanted)):
                self._fail(stream, error)
            elif self._device.room(1):
                table.blocks.extend(self._pool.take(1))
                ready.append(stream)
            else:
                shortfall += 1
        if shortfall == 0:
            return ready
        shortfall -= sum(stream.leaving_blocks for stream in self._in_stage(Stage.PARKING))
        if shortfall <= 0:
            return ready
        running = self._in_stage(Stage.RUNNING)
        private = [self._pool.private_count(stream.sequence.blocks) for stream in running]
        leaving = victims(shortfall, private)
        for stream in running[len(running) - leaving :]:
            self._park(stream)
        return [stream for stream in ready if stream.stage is Stage.RUNNING]

    def _park(self, stream: Stream) -> None:
        self._workplace.stirred = True
        sequence, full = stream.sequence, stream.sequence.full_blocks
        request = sequence.request
        stream.leaving_blocks = self._pool.private_count(sequence.blocks)
        stream.move_to(Stage.PARKING)
        self._device.submit(
            Park(
                self._workplace.local,
                request.request,
                request.attempt,
                sequence.keys(full),
                tuple(sequence.blocks[:full]),
                sequence.tail_block,
            ),
            stream,
        )
        self._workplace.release_blocks(stream.sequence)  # the move holds those that it reads

    def _on_parked(
        self, stream: Stream, ticket: TicketId | None, error: PdserveError | None
    ) -> None:
        if stream.stage is Stage.GONE:
            if ticket is not None:
                self._device.submit(Abort(self._workplace.local, ticket))
            return
        if error is not None:
            self._fail(stream, error)
            return
        assert ticket is not None
        sequence = stream.sequence
        timing = sequence.timing
        handoff = Handoff(
            request=sequence.request,
            route=sequence.route,
            ticket=ticket,
            store=self._workplace.local,
            tokens=tuple(sequence.tokens),
            block_keys=sequence.keys(sequence.full_blocks),
            unsent=(),
            timing=replace(timing, parked_count=timing.parked_count + 1, since_unix_us=unix_us()),
        )
        self._counters["parked"] += 1
        self._workplace.say(Parked(handoff))
        self._forget(stream)

    # ── letting go ───────────────────────────────────────────────────────────────────────────────

    def _end(self, stream: Stream) -> None:
        self._workplace.say(progress(stream.sequence, Event.ENDED))
        self._workplace.offer_blocks(stream.sequence)
        self._let_go(stream)

    def _fail(self, stream: Stream, error: PdserveError) -> None:
        self._workplace.say_failed(stream.sequence, error)
        self._let_go(stream)

    def _let_go(self, stream: Stream) -> None:
        if stream.stage is Stage.WAITING and stream.handoff is not None:
            self.refuse(stream.handoff)
        self._workplace.release_blocks(stream.sequence)
        self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        stream.move_to(Stage.GONE)
        del self._streams[stream.sequence.id]
        self._workplace.stirred = True  # whoever waits for room looks again

    def _in_stage(self, stage: Stage) -> list[Stream]:
        return [stream for stream in self._streams.values() if stream.stage is stage]
