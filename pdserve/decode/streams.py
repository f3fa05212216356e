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

A beam search is one stream with several sequences, its beams, which fork and are dropped as the
search goes (``beam_group``). It says nothing until it is over, and then all its answers. Parked it
is its prompt again, and begins anew wherever it is resumed, so it is not parked for others.

A sequence that ends leaves its full blocks to the store, where the conversation's next turn is.
"""

from collections.abc import Sequence as Tokens
from dataclasses import replace
from functools import partial
from itertools import chain

from pdserve.clock import steady_unix_us
from pdserve.decode.beam_group import BeamGroup
from pdserve.decode.drafts import Drafts
from pdserve.decode.room import victims
from pdserve.decode.speculation import Speculation
from pdserve.decode.stream import Stage, Stream
from pdserve.engine.loop import Following, Share, StepTime
from pdserve.engine.masks import looking_ahead
from pdserve.engine.moves import Abort, AbortAttempts, Adopt, Forsake, Moved, Park
from pdserve.engine.sayings import progress
from pdserve.engine.sequence import Sequence, stretch_us
from pdserve.engine.workplace import RETRY_AFTER_MS, Workplace
from pdserve.errors import OutOfBlocks, PdserveError, QueueFull
from pdserve.ids import RequestId, TicketId
from pdserve.lifecycle import Event
from pdserve.messages import Attained, Cancel, Handoff, Parked, Token
from pdserve.model.runner import Run

WAITING_MAX = 256
"""Hand-offs that wait for room. The router reserves before it dispatches, so few do."""


class Streams:
    def __init__(self, workplace: Workplace, speculation: Speculation | None = None) -> None:
        self._workplace = workplace
        self._device = workplace.device
        self._pool = workplace.pool
        self._counters = workplace.counters
        self._block_tokens = workplace.block_tokens
        self._drafts = Drafts(
            speculation, self._pool, self._counters, block_tokens=self._block_tokens
        )
        self._streams: dict[RequestId, Stream] = {}  # in order of arrival
        self._draining = False

    # ── Part ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def held(self) -> int:
        return sum(stream.width for stream in self._streams.values())

    @property
    def waiting(self) -> int:
        return sum(stream.width for stream in self._in_stage(Stage.WAITING))

    @property
    def growing(self) -> int:
        begun = (Stage.ADOPTING, Stage.RUNNING)
        return sum(stream.width for stream in self._streams.values() if stream.stage in begun)

    def attempt_of(self, request: RequestId) -> int | None:
        stream = self._streams.get(request)
        return stream.sequence.request.attempt if stream else None

    def sequences(self, *, computing: bool) -> list[Sequence]:
        streams = self._in_stage(Stage.RUNNING) if computing else self._streams.values()
        return [stream.sequence for stream in streams]

    def preempt(self, request: RequestId, attempt: int) -> None:
        stream = self._streams.get(request)
        if stream is None or stream.group is not None or stream.stage is not Stage.RUNNING:
            return
        if stream.sequence.request.attempt == attempt:
            self._park(stream)

    def cancel(self, cancel: Cancel) -> None:
        stream = self._streams.get(cancel.request)
        if stream is None:  # its hand-off may be lost on the way here, and its ticket with it
            abort = AbortAttempts(self._workplace.local, cancel.request, cancel.attempt)
            self._device.submit(abort)
        elif cancel.covers(stream.sequence.request.attempt):
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
            Attained(stream.sequence.id, stream.sequence.request.attempt, stream.generated_count)
            for stream in self._in_stage(Stage.RUNNING)
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
        too_many = self.waiting >= WAITING_MAX
        stream = Stream(sequence, handoff)
        if handoff.unsent or sequence.ending:
            self._note_takeover(sequence)
            self._first_tokens(stream, handoff.unsent)
        self._streams[request.request] = stream
        blocks = self._workplace.blocks_for(handoff.length) + stream.first_blocks
        too_large = self._workplace.never_fits(blocks)
        if sequence.ending is not None:
            self._end(stream)
        elif too_large is not None:
            self._too_large(stream, too_large)
        elif too_many:
            said = f"{WAITING_MAX} hand-offs wait already"
            self._fail(stream, QueueFull(said, retry_after_ms=RETRY_AFTER_MS))

    def _first_tokens(self, stream: Stream, tokens: tuple[Token, ...]) -> None:
        """The client's, or where a beam search begins."""
        sequence = stream.sequence
        if sequence.request.beams is None:
            self._workplace.say_tokens(sequence, tokens, timed=True)
        else:
            (first,) = tokens
            stream.group = BeamGroup(sequence, first)

    def refuse(self, handoff: Handoff) -> None:
        """Nobody will read these blocks: the store need not keep them pinned."""
        self._device.submit(Abort(handoff.store, handoff.ticket))

    def keep(self, sequence: Sequence, token: Token) -> None:
        """Go on with a sequence whose prompt was computed here, and whose first token this is."""
        sequence.timing = replace(sequence.timing, decode=self._workplace.worker)
        stream = Stream(sequence, None, Stage.RUNNING)
        self._streams[sequence.id] = stream
        self._first_tokens(stream, (token,))
        self._on_running(stream)

    def _on_running(self, stream: Stream) -> None:
        self._workplace.say(progress(stream.sequence, Event.ADOPTED))
        if stream.group is not None and stream.group.search.is_over:
            stream.group.say_answers(self._workplace)
            self._end(stream)
        elif self._draining:
            self._park(stream)

    def begin(self, slots: int, growing: int) -> None:
        """Begin to copy in the longest waiting. One that is wider than all there is begins
        alone."""
        loading = {key for stream in self._in_stage(Stage.ADOPTING) for key in stream.keys}
        for stream in self._in_stage(Stage.WAITING):
            missing = stream.keys[self._pool.published(stream.keys) :]
            if missing and missing[0] in loading:
                continue  # another choice of the same call is bringing it
            is_too_wide = slots < stream.width and growing > 0
            if slots <= 0 or is_too_wide or not self._adopt(stream, growth_blocks=growing):
                return
            slots, growing = slots - stream.width, growing + stream.width
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
        if not self._device.room(wanted + stream.first_blocks + growth_blocks):
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
        self._on_running(stream)

    def _note_takeover(self, sequence: Sequence) -> None:
        """Time since prefill's first token, up to now; said again it only becomes larger."""
        timing, now_us = sequence.timing, steady_unix_us()
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
        plain = [stream for stream in streams if stream.group is None]
        drafted = list(zip(plain, self._drafts.of(plain, growing), strict=True))
        groups = [(stream, stream.group) for stream in streams if stream.group is not None]
        beams = [beam for _, group in groups for beam in group.beams]
        return Share(
            runs=[
                *(self._run(stream.sequence, drafts) for stream, drafts in drafted),
                *(self._run(beam, []) for beam in beams),
            ],
            rows=looking_ahead(
                [(stream.sequence.guide, drafts) for stream, drafts in drafted],
                chain(
                    (
                        stream.sequence.sampler_row(drafts[:count])
                        for stream, drafts in drafted
                        for count in range(len(drafts) + 1)
                    ),
                    (beam.sampler_row() for beam in beams),
                ),
            ),
            on_done=partial(self._on_step, drafted, groups=groups),
            after=partial(self._after, plain) if not (self._drafts.are_made or groups) else None,
        )

    def _after(self, streams: list[Stream]) -> Following | None:
        """The step after one of ``streams`` whose tokens are not known yet. Who has all its tokens
        with that one takes no part; who turns out to end with it does, in vain. None: somebody is
        to join, or blocks are short."""
        rows = [
            row
            for row, stream in enumerate(streams)
            if stream.stage is Stage.RUNNING and stream.sequence.tokens_left > 1
        ]
        going = [streams[row] for row in rows]
        missing = [
            max(0, stream.sequence.table.blocks_needed(len(stream.sequence.tokens) + 1))
            for stream in going
        ]
        joining = set(self._in_stage(Stage.RUNNING)) - set(streams)
        if not going or joining or not self._device.room(sum(missing)):
            return None
        for stream, count in zip(going, missing, strict=True):
            stream.sequence.table.blocks.extend(self._pool.take(count))
        unknown = 0
        share = Share(
            runs=[
                Run(
                    tokens=(unknown,),
                    start=len(stream.sequence.tokens),
                    blocks=stream.sequence.blocks,
                    adapter=stream.sequence.request.adapter,
                )
                for stream in going
            ],
            rows=(),
            on_done=partial(self._on_step, [(stream, []) for stream in going]),
            after=partial(self._after, going),
        )
        return Following(share, rows)

    def _on_step(
        self,
        drafted: list[tuple[Stream, list[int]]],
        drawn: Tokens[Token],
        time: StepTime,
        groups: Tokens[tuple[Stream, BeamGroup]] = (),
    ) -> int:
        self._drafts.took(len(drawn), time)
        first = generated = 0
        for stream, drafts in drafted:
            end = first + 1 + len(drafts)
            if stream.stage is Stage.RUNNING:  # else it left while the step was in flight
                generated += self._on_drawn(stream, drafts, drawn[first:end])
            first = end
        for stream, group in groups:
            end = first + len(group.beams)
            generated += end - first
            group.advance(drawn[first:end], self._pool)
            if group.search.is_over:
                group.say_answers(self._workplace)
                self._end(stream)
            first = end
        return generated

    def _run(self, sequence: Sequence, drafts: list[int]) -> Run:
        return Run(
            tokens=[sequence.tokens[-1], *drafts],
            start=len(sequence.tokens) - 1,
            blocks=sequence.blocks,
            draft_count=len(drafts),
            adapter=sequence.request.adapter,
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
        self._drafts.came(stream, drafts, tokens)
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

    # ── room ─────────────────────────────────────────────────────────────────────────────────────

    def _with_room(self) -> list[Stream]:
        """The running streams that have a place for their next token, oldest first.

        Where blocks are short, the latest are parked; who still lacks one skips steps until their
        blocks arrive.
        """
        running = self._in_stage(Stage.RUNNING)
        ready, shortfall = [], 0
        for stream in running:
            missing = stream.missing_blocks
            if missing and (error := self._never_fits(stream, missing)):
                self._too_large(stream, error)
            elif missing and not self._device.room(missing):
                shortfall += missing
            else:
                if missing or stream.group is not None:
                    self._extend(stream, missing)
                ready.append(stream)
        if shortfall == 0:
            return ready
        shortfall -= sum(stream.leaving_blocks for stream in self._in_stage(Stage.PARKING))
        if shortfall <= 0:
            return ready
        running = self._in_stage(Stage.RUNNING)
        private = [self._pool.private_count(stream.blocks) for stream in running]
        leaving = victims(shortfall, private)
        for stream in running[len(running) - leaving :]:
            self._park(stream)
        return [stream for stream in ready if stream.stage is Stage.RUNNING]

    def _never_fits(self, stream: Stream, missing_blocks: int) -> OutOfBlocks | None:
        return self._workplace.never_fits(len(set(stream.blocks)) + missing_blocks)

    def _extend(self, stream: Stream, missing_blocks: int) -> None:
        """Room for the next token; for a beam search, its next beams."""
        if stream.group is None:
            stream.sequence.blocks.extend(self._pool.take(missing_blocks))
        else:
            stream.group.branch(self._pool, self._workplace.copy_block)

    def _park(self, stream: Stream) -> None:
        self._workplace.stirred = True
        sequence, full = stream.sequence, stream.sequence.full_blocks
        request = sequence.request
        stream.leaving_blocks = self._pool.private_count(stream.blocks)
        stream.move_to(Stage.PARKING)
        self._device.submit(
            Park(
                self._workplace.local,
                request.request,
                request.attempt,
                sequence.keys(full),
                tuple(sequence.blocks[:full]),
                sequence.tail_block,
                request.tenant,
            ),
            stream,
        )
        self._release(stream)  # the move holds those that it reads

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
        timing = replace(sequence.timing, since_unix_us=steady_unix_us())
        handoff = Handoff(
            request=sequence.request,
            route=sequence.route,
            ticket=ticket,
            store=self._workplace.local,
            tokens=tuple(sequence.tokens),
            block_keys=sequence.keys(sequence.full_blocks),
            unsent=(stream.group.first,) if stream.group else (),
            timing=replace(timing, parked_count=timing.parked_count + 1),
            namespace=sequence.namespace.hex(),
        )
        self._counters["parked"] += 1
        self._workplace.say(Parked(handoff))
        self._forget(stream)

    # ── letting go ───────────────────────────────────────────────────────────────────────────────

    def _end(self, stream: Stream) -> None:
        ended = progress(stream.sequence, Event.ENDED)
        total_tokens = stream.sequence.request.prompt_tokens + stream.generated_count
        self._workplace.say(replace(ended, total_tokens=total_tokens))
        self._workplace.offer_blocks(stream.sequence)
        self._let_go(stream)

    def _too_large(self, stream: Stream, error: OutOfBlocks) -> None:
        """The router finds that out with the next attempt; but a search's would come as far again,
        so it is its client who is told."""
        if stream.group is None:
            self._fail(stream, error)
        else:
            self._workplace.say_error(stream.sequence, error)
            self._end(stream)

    def _fail(self, stream: Stream, error: PdserveError) -> None:
        self._workplace.say_failed(stream.sequence, error)
        self._let_go(stream)

    def _let_go(self, stream: Stream) -> None:
        if stream.stage is Stage.WAITING and stream.handoff is not None:
            self.refuse(stream.handoff)
        self._release(stream)
        self._forget(stream)

    def _release(self, stream: Stream) -> None:
        self._drafts.end(stream)
        for sequence in stream.sequences:
            self._workplace.release_blocks(sequence)

    def _forget(self, stream: Stream) -> None:
        stream.move_to(Stage.GONE)
        del self._streams[stream.sequence.id]
        self._workplace.stirred = True  # whoever waits for room looks again

    def _in_stage(self, stage: Stage) -> list[Stream]:
        return [stream for stream in self._streams.values() if stream.stage is stage]
