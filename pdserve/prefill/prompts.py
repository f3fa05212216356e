"""Prompts in, KV blocks into decode's store, one first token each.

A prompt takes all its device blocks at once (so two prompts never wait for each other's), what of
its prefix the device pool or the store of this host has, and a ticket at the store of decode's
host. Then it is computed chunk by chunk. After each chunk the blocks that became full are pushed
under the ticket by the mover while the next chunk is computed; those of the last one while it is
computed itself, layer by layer (``engine.layered``). Then the first token is drawn, what is left of
blocks and tail is committed and sealed, and decode is sent the hand-off.

A prompt whose route ends where it begins *stays*: no ticket, no push, and after its first token the
sequence goes on here with the blocks it has. What it computes is offered to the store all the same.
One that is only read (``readings``) stays too, and ends with its last chunk.

Between two steps every prompt stands at a chunk's border, so preemption needs no waiting: a
preempted prompt leaves its full blocks in the store of this host and goes; whoever gets it next
finds them and computes each token once.

A prefix that somebody else has computed is looked for again before each chunk, and two prompts
that want the same next block do not compute it in the same step: the choices of one call, which
arrive together, share all full blocks of their prompt.
"""

from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import replace
from functools import partial

from pdserve.engine.loop import Share, StepTime
from pdserve.engine.masks import looking_ahead
from pdserve.engine.moves import Abort, Moved, OpenTicket, Push, PushLayers, Put, Restore
from pdserve.engine.restoring import PrefillMeter
from pdserve.engine.sayings import progress
from pdserve.engine.sequence import Ending, Sequence
from pdserve.engine.workplace import RETRY_AFTER_MS, Workplace
from pdserve.errors import OutOfBlocks, PdserveError, QueueFull
from pdserve.ids import BlockKey, RequestId
from pdserve.lifecycle import Event
from pdserve.messages import Cancel, ChunkDone, Dispatch, FinishReason, Token
from pdserve.model.ops import LayersTold
from pdserve.model.runner import Run
from pdserve.prefill.batch import (
    chunk_tokens,
    double_cost_tokens,
    equal_work_tokens,
    shares_us,
)
from pdserve.prefill.prompt import Prompt, Stage
from pdserve.prefill.readings import Reading, reading_of

WAITING_MAX = 64
"""Prompts taken and not begun. The router binds late and keeps this at one or two."""

TICKET_SLICE_MS = 20
"""How long one attempt to open a ticket may hold up the mover's other moves; then they go first."""


class Prompts:
    def __init__(self, workplace: Workplace, keep: Callable[[Sequence, Token], None]) -> None:
        """``keep`` takes over, blocks and all, a sequence that stays and its first token."""
        self._workplace = workplace
        self._keep = keep
        self._store = workplace.store
        self._device = workplace.device
        self._pool = workplace.pool
        self._counters = workplace.counters
        self._block_tokens = workplace.block_tokens
        self._meter = PrefillMeter(double_cost_tokens(workplace.attention_like_linear_tokens))
        self._prompts: dict[RequestId, Prompt] = {}  # in line
        self._draining = False

    # ── Part ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def held(self) -> int:
        return len(self._prompts)

    @property
    def waiting(self) -> int:
        return sum(prompt.stage is Stage.WAITING for prompt in self._prompts.values())

    @property
    def growing(self) -> int:
        return sum(prompt.grows for prompt in self._prompts.values())

    def attempt_of(self, request: RequestId) -> int | None:
        prompt = self._prompts.get(request)
        return prompt.sequence.request.attempt if prompt else None

    def sequences(self, *, computing: bool) -> list[Sequence]:
        prompts = self._in_stage(Stage.COMPUTING) if computing else self._prompts.values()
        return [prompt.sequence for prompt in prompts]

    def preempt(self, request: RequestId, attempt: int) -> None:
        prompt = self._prompts.get(request)
        if prompt and prompt.sequence.request.attempt == attempt:
            self._preempt(prompt)

    def cancel(self, cancel: Cancel) -> None:
        prompt = self._prompts.get(cancel.request)
        if prompt and cancel.covers(prompt.sequence.request.attempt):
            self._let_go(prompt)

    def give_up(self) -> None:
        for prompt in list(self._prompts.values()):
            self._let_go(prompt)

    def drain(self) -> None:
        """What has begun is finished; what has not goes back to the router."""
        self._draining = True
        for prompt in self._in_stage(Stage.WAITING):
            self._preempt(prompt)

    # ── taking in ────────────────────────────────────────────────────────────────────────────────

    def take(self, dispatch: Dispatch) -> None:
        request, route = dispatch.request, dispatch.route
        sequence = self._workplace.sequence(
            request, route, request.tokens, dispatch.timing, request.block_keys
        )
        prompt = Prompt(
            sequence,
            route.decode_store or self._workplace.local,
            stays=self._workplace.stays(route) or request.task is not None,
            cached_tokens=dispatch.cached_tokens,
            reading=reading_of(request),
        )
        too_large = self._workplace.never_fits(self._workplace.blocks_for(request.length))
        if sequence.ending is not None:  # delivered by an earlier attempt, or not to be had here
            self._say_end(sequence, ())
        elif too_large is not None:
            self._workplace.say_failed(sequence, too_large)
        elif self.waiting >= WAITING_MAX:
            full = QueueFull(f"{WAITING_MAX} prompts wait already", retry_after_ms=RETRY_AFTER_MS)
            self._workplace.say_failed(sequence, full)
        else:
            self._line_up(prompt, dispatch.ahead_of)
            if self._draining:
                self._preempt(prompt)

    def _line_up(self, prompt: Prompt, ahead_of: RequestId | None) -> None:
        """Last, or before one that lets it go first. That one may be done by now."""
        line = list(self._prompts.items())
        places = (place for place, (request, _) in enumerate(line) if request == ahead_of)
        line.insert(next(places, len(line)), (prompt.sequence.id, prompt))
        self._prompts = dict(line)

    def begin(self, slots: int, growing: int) -> None:
        """Nobody overtakes: the first without room ends it."""
        for prompt in self._in_stage(Stage.WAITING)[:slots]:
            if not self._begin(prompt, growing):
                return
            growing += prompt.grows
            self._workplace.stirred = True

    def _begin(self, prompt: Prompt, growing: int) -> bool:
        sequence = prompt.sequence
        keys = prompt.cacheable
        held = self._pool.hold_published(keys)
        wanted = self._workplace.blocks_for(len(sequence.tokens)) - len(held)
        if not self._device.room(wanted + growing):
            self._pool.release(held)
            return False
        sequence.blocks.extend(held + self._pool.take(wanted))
        sequence.kv_count = len(held) * self._block_tokens
        self._counters["prompt_tokens_cached_device"] += sequence.kv_count
        if not prompt.stays:
            prompt.ticket_tries = -(-self._store.ticket_wait_ms // TICKET_SLICE_MS)  # ceil
            self._open_ticket(prompt)
        # The router knows what the stores of prefill workers have, a master those of all hosts.
        known = None if self._workplace.sees_other_hosts else prompt.cached_tokens
        worth_asking = known is None or known > sequence.kv_count
        if self._store.offload and len(held) < len(keys) and worth_asking:
            prompt.move_to(Stage.RESTORING)
            blocks = tuple(sequence.blocks[len(held) : len(keys)])
            restore = Restore(
                self._workplace.local,
                keys,
                len(held),
                blocks,
                prompt_tokens=len(sequence.tokens),
                block_tokens=self._block_tokens,
                speed=self._meter.speed,
                tenant=sequence.request.tenant,
            )
            self._device.submit(restore, prompt)
        else:
            prompt.move_to(Stage.COMPUTING)
        return True

    def _open_ticket(self, prompt: Prompt) -> None:
        prompt.ticket_tries -= 1
        request, route = prompt.sequence.request, prompt.sequence.route
        self._device.submit(
            OpenTicket(
                prompt.store,
                request.request,
                request.attempt,
                reader=route.decode,
                block_count=len(prompt.sequence.blocks),
                wait_ms=min(TICKET_SLICE_MS, self._store.ticket_wait_ms),
                tenant=request.tenant,
            ),
            prompt,
        )

    # ── finished moves ───────────────────────────────────────────────────────────────────────────

    def on_moved(self, moved: Moved) -> None:
        prompt = moved.owner
        if not isinstance(prompt, Prompt):
            return
        match moved.move:
            case Restore():
                self._on_restored(prompt, moved.move, moved.count)
            case OpenTicket():
                self._on_ticket(prompt, moved)
            case Push():
                self._on_pushed(prompt, moved)
            case Put() if prompt.stage is Stage.LEAVING:
                self._say_preempted(prompt)
            case _:
                pass

    def _on_restored(self, prompt: Prompt, move: Restore, count: int) -> None:
        if prompt.stage is not Stage.RESTORING:
            return
        sequence = prompt.sequence
        for key, block in zip(move.keys[move.first :][:count], move.blocks, strict=False):
            self._pool.publish(key, block)
        sequence.kv_count += count * self._block_tokens
        self._counters["prompt_tokens_cached_store"] += count * self._block_tokens
        prompt.move_to(Stage.COMPUTING)
        self._push(prompt)

    def _on_ticket(self, prompt: Prompt, moved: Moved) -> None:
        wanted = prompt.stage not in (Stage.LEAVING, Stage.GONE)
        if moved.ticket is not None:
            prompt.ticket = moved.ticket
            if wanted:
                self._push(prompt)
            else:
                self._abort_ticket(prompt)
        elif wanted:
            assert moved.error is not None
            if isinstance(moved.error, OutOfBlocks) and prompt.ticket_tries > 0:
                self._open_ticket(prompt)
            else:
                self._fail(prompt, moved.error)

    def _on_pushed(self, prompt: Prompt, moved: Moved) -> None:
        move, error = moved.move, moved.error
        assert isinstance(move, Push)
        prompt.pushing = False
        if prompt.stage in (Stage.LEAVING, Stage.GONE):
            return
        if error is not None:
            self._fail(prompt, error)
        elif move.seal:
            if move.announce is not None and not moved.announced:
                self._workplace.hand_off(move.announce)
            self._workplace.say(progress(prompt.sequence, Event.PREFILL_DONE))
            prompt.ticket = None  # decode's now
            self._let_go(prompt)
        else:
            self._push(prompt)

    def _push(self, prompt: Prompt) -> None:
        """Push what is computed and not yet pushed; with the first token drawn, tail and seal."""
        sequence, full = prompt.sequence, prompt.sequence.full_blocks
        seal = prompt.stage is Stage.SEALING
        ready = seal or (prompt.stage is Stage.COMPUTING and full > prompt.pushed_blocks)
        if prompt.ticket is None or prompt.pushing or not ready:
            return
        first, prompt.pushed_blocks = prompt.pushed_blocks, full
        prompt.pushing = True
        self._device.submit(
            Push(
                prompt.store,
                prompt.ticket,
                sequence.keys(full),
                first,
                tuple(sequence.blocks[first:full]),
                seal=seal,
                tail=sequence.tail_block if seal else None,
                announce=prompt.handoff() if seal else None,
            ),
            prompt,
        )
        if prompt.store != self._workplace.local:
            self._workplace.offer_blocks(sequence)

    # ── computing ────────────────────────────────────────────────────────────────────────────────

    def share(self, budget_tokens: int, *, beside_streams: bool) -> Share | None:
        """The chunks that fit the budget, oldest prompt first."""
        chosen = self._choose_chunks(budget_tokens, beside_streams)
        if not chosen:
            return None
        ends = [prompt for prompt, chunk in chosen if prompt.remaining_tokens == chunk]
        last = [prompt for prompt in ends if prompt.reading is None]
        return Share(
            runs=[self._run(prompt, chunk) for prompt, chunk in chosen],
            rows=looking_ahead(
                [(prompt.sequence.guide, ()) for prompt in last],
                (prompt.sequence.sampler_row() for prompt in last),
            ),
            on_done=partial(self._on_step, chosen),
            told=self._told([self._last_layers(prompt) for prompt in last if not prompt.stays]),
        )

    def _told(self, pushes: list[PushLayers]) -> LayersTold | None:
        """Has the last blocks of prompts pushed while they are computed: the first token waits."""
        if not pushes:
            return None

        def tell(layers: int, done: object) -> None:
            for push in pushes:
                self._device.submit(replace(push, layers=layers, done=done))

        return LayersTold(self._workplace.layers_told, tell)

    def _last_layers(self, prompt: Prompt) -> PushLayers:
        """Of the push that ``_push`` will ask for when the step is done."""
        sequence, request = prompt.sequence, prompt.sequence.request
        full, rest = divmod(len(sequence.tokens), self._block_tokens)
        return PushLayers(
            prompt.store,
            request.request,
            request.attempt,
            sequence.keys(full),
            prompt.pushed_blocks,
            tuple(sequence.blocks[prompt.pushed_blocks : full]),
            tail=sequence.blocks[full] if rest else None,
            layers=0,
            done=None,
        )

    def _on_step(
        self, chosen: list[tuple[Prompt, int]], tokens: Tokens[Token], time: StepTime
    ) -> int:
        first_tokens = iter(tokens)
        counts = [(prompt.sequence.kv_count, chunk) for prompt, chunk in chosen]
        self._meter.observe([(start, start + chunk) for start, chunk in counts], time.elapsed_us)
        parts_us = shares_us(time.elapsed_us, tuple(chunk for _, chunk in chosen))
        for (prompt, chunk), share_us in zip(chosen, parts_us, strict=True):
            self._on_computed(prompt, chunk, share_us)
            if prompt.stays:
                self._workplace.offer_blocks(prompt.sequence)
            if prompt.reading is not None:
                self._on_read(prompt, prompt.reading)
            elif prompt.remaining_tokens == 0:
                self._on_first_token(prompt, next(first_tokens))
            self._push(prompt)
        return len(tokens)

    def _choose_chunks(self, budget: int, beside_streams: bool) -> list[tuple[Prompt, int]]:
        chosen: list[tuple[Prompt, int]] = []
        begun: set[BlockKey] = set()  # blocks that this step computes for somebody
        for prompt in self._in_stage(Stage.COMPUTING):
            self._take_cached(prompt)
            next_keys = prompt.cacheable[prompt.sequence.full_blocks :]
            if next_keys and next_keys[0] in begun:
                continue
            allowed = self._allowed(prompt, budget) if beside_streams else budget
            chunk = chunk_tokens(prompt.remaining_tokens, allowed, self._block_tokens)
            if chunk == 0:
                break
            if chosen and chunk < prompt.remaining_tokens:
                break  # who is done in this step does not wait for a part of a longer one
            budget -= chunk * budget // allowed
            begun.update(next_keys[:1])
            chosen.append((prompt, chunk))
        return chosen

    def _allowed(self, prompt: Prompt, budget: int) -> int:
        """Tokens of this prompt; fewer than a block are for those that need no more."""
        if budget < self._block_tokens:
            return budget
        start = prompt.sequence.kv_count
        double_tokens = double_cost_tokens(self._workplace.attention_like_linear_tokens)
        return equal_work_tokens(budget, start, double_tokens, self._block_tokens)

    def _take_cached(self, prompt: Prompt) -> None:
        """Swap own blocks that come next for those that somebody computed meanwhile."""
        sequence = prompt.sequence
        first = sequence.full_blocks
        held = self._pool.hold_published(prompt.cacheable[first:])
        if not held:
            return
        self._pool.release(sequence.blocks[first : first + len(held)])
        sequence.blocks[first : first + len(held)] = held
        sequence.kv_count += len(held) * self._block_tokens
        self._counters["prompt_tokens_cached_device"] += len(held) * self._block_tokens

    def _run(self, prompt: Prompt, chunk: int) -> Run:
        sequence = prompt.sequence
        start, end = sequence.kv_count, sequence.kv_count + chunk
        is_last, reading = end == len(sequence.tokens), prompt.reading
        return Run(
            tokens=sequence.tokens[start:end],
            start=start,
            blocks=sequence.blocks[: self._workplace.blocks_for(end)],
            wants_logits=is_last and reading is None,
            adapter=sequence.request.adapter,
            reader=reading.reader(start=start, end=end) if reading is not None else None,
        )

    def _on_computed(self, prompt: Prompt, chunk: int, share_us: int) -> None:
        sequence, first = prompt.sequence, prompt.sequence.full_blocks
        sequence.kv_count += chunk
        sequence.timing = replace(sequence.timing, step_us=sequence.timing.step_us + share_us)
        prompt.computed_tokens += chunk
        self._counters["prompt_tokens_computed"] += chunk
        for index, key in enumerate(sequence.keys(sequence.full_blocks)[first:], first):
            self._pool.publish(key, sequence.blocks[index])
        request = sequence.request
        self._workplace.say(
            ChunkDone(request.request, request.attempt, sequence.kv_count, share_us)
        )

    def _on_read(self, prompt: Prompt, reading: Reading) -> None:
        """What a chunk has told; with the last one the request ends here."""
        sequence, is_last = prompt.sequence, prompt.remaining_tokens == 0
        for delta in reading.deltas(last=is_last):
            self._workplace.say_of_prompt(sequence, delta)
        if is_last:
            prompt.note_computed(self._workplace.worker)
            sequence.ending = Ending(FinishReason.STOP)
            self._say_end(sequence, ())
            self._let_go(prompt)

    def _on_first_token(self, prompt: Prompt, token: Token) -> None:
        sequence = prompt.sequence
        prompt.note_computed(self._workplace.worker)
        if sequence.request.beams is None:
            sequence.accept(token)
        else:  # which of the candidates come first is the search's to say
            sequence.tokens.append(token.token)
        if sequence.ending is None and prompt.stays:
            self._workplace.say(progress(sequence, Event.PREFILL_DONE))
            self._forget(prompt)
            self._keep(sequence, token)
            return
        if sequence.ending is None:
            prompt.first_token = token
            prompt.move_to(Stage.SEALING)
            return
        self._say_end(sequence, (token,))
        self._workplace.offer_blocks(sequence)
        self._let_go(prompt)

    # ── letting go ───────────────────────────────────────────────────────────────────────────────

    def _preempt(self, prompt: Prompt) -> None:
        if prompt.stage in (Stage.SEALING, Stage.LEAVING):
            return  # too late: nothing is left to compute; or twice
        if prompt.stage is Stage.WAITING:
            self._say_preempted(prompt)
            return
        sequence, full = prompt.sequence, prompt.sequence.full_blocks
        prompt.move_to(Stage.LEAVING)
        if self._store.offload and full:
            blocks, tenant = tuple(sequence.blocks[:full]), sequence.request.tenant
            put = Put(self._workplace.local, sequence.keys(full), blocks, tenant)
            self._device.submit(put, prompt)
        else:
            self._say_preempted(prompt)
        self._abort_ticket(prompt)  # behind the put: what the ticket pins is still there for it

    def _fail(self, prompt: Prompt, error: PdserveError) -> None:
        self._workplace.say_failed(prompt.sequence, error)
        self._let_go(prompt)

    def _let_go(self, prompt: Prompt) -> None:
        self._abort_ticket(prompt)
        self._workplace.release_blocks(prompt.sequence)
        self._forget(prompt)

    def _forget(self, prompt: Prompt) -> None:
        prompt.move_to(Stage.GONE)
        del self._prompts[prompt.sequence.id]

    def _abort_ticket(self, prompt: Prompt) -> None:
        if prompt.ticket is not None:
            self._device.submit(Abort(prompt.store, prompt.ticket))
            prompt.ticket = None

    # ── saying ───────────────────────────────────────────────────────────────────────────────────

    def _say_preempted(self, prompt: Prompt) -> None:
        self._counters["preempted"] += 1
        self._workplace.say(progress(prompt.sequence, Event.PREEMPTED))
        self._let_go(prompt)

    def _say_end(self, sequence: Sequence, tokens: tuple[Token, ...]) -> None:
        self._workplace.say_tokens(sequence, tokens, timed=True)
        self._workplace.say(progress(sequence, Event.ENDED))

    def _in_stage(self, stage: Stage) -> list[Prompt]:
        return [prompt for prompt in self._prompts.values() if prompt.stage is stage]
