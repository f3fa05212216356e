"""One loop and one forward pass per step, over the two kinds of work of a worker.

    Dispatch ────────────► prompts ──first token──► streams ──tokens──► gateway
                              │ (or ToDecode)          ▲
    Handoff, Resume ──────────┼────────────────────────┘
                              ▼                        ▼
                       chunks of prompts   +   a token of each stream   =   one packed batch

A worker of either role has both parts; which it uses is the router's choice, by the ``Route`` of a
request. A step's batch takes every running stream first, and then chunks of prompts under a budget
of tokens: the whole ``chunk_tokens`` where no stream runs, ``mixed_chunk_tokens`` where one does,
since every stream waits for the whole step. So a prompt that comes in delays a token by one small
chunk and never by itself.

Room is shared alike. Prompts and streams together are at most ``running_max``, and who comes in
leaves a block for each sequence that will go on growing here.

With ``step_ahead`` a step is launched before the tokens of the one before it are known here, where
the device can draw them and nobody joins: it need not wait while they are looked at. Such a step is
*in flight*. What it gave for a stream that has gone by then is thrown away.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never

from pdserve.clock import MS, US, Clock, S, monotonic, steady_unix_ms
from pdserve.config import PoolConfig
from pdserve.engine.blocks import BlockPool
from pdserve.engine.mover import Mover
from pdserve.engine.moves import Moved
from pdserve.engine.outputs import GiveUp, Load, Output
from pdserve.engine.runner import Runner, ends_worker, wait_for
from pdserve.engine.sequence import Sequence as Computed
from pdserve.engine.workplace import Workplace
from pdserve.errors import StepFailed
from pdserve.ids import RequestId
from pdserve.lifecycle import Phase
from pdserve.messages import (
    Attained,
    Cancel,
    Dispatch,
    Handoff,
    Preempt,
    Request,
    Resume,
    Token,
)
from pdserve.model.drawn import Drawn
from pdserve.model.ops import LayersTold
from pdserve.model.runner import Run
from pdserve.model.sampler import SamplerRow, is_plain, sample
from pdserve.suspicion import alone_in_step

log = logging.getLogger(__name__)

ATTAINED_EVERY_NS = 1 * S
EXPIRE_EVERY_NS = S // 10

FAILED_STEPS_MAX = 4
"""One after the other: then it is not the requests, and the worker ends."""


@dataclass(frozen=True, slots=True)
class StepTime:
    elapsed_us: int
    shared: bool  # the step computed another part's runs too


@dataclass(frozen=True, slots=True)
class Share:
    """What a part adds to one step, and what it does with the outcome."""

    runs: list[Run]
    rows: Iterable[SamplerRow]
    """How a token is drawn from each row of logits that ``runs`` want, in order. Gone through once,
    while a GPU computes them."""

    on_done: Callable[[Sequence[Token], StepTime], int]
    """Called with the drawn tokens; returns how many of them were generated: those drawn after a
    draft that was wrong were not."""

    told: LayersTold | None = None
    """Hears, during the step, of the layers that are written."""

    after: "Callable[[], Following | None] | None" = None
    """While nobody knows the tokens of this step: the step after it. None: they must be known."""


@dataclass(frozen=True, slots=True)
class Following:
    share: Share  # a token of each run; which one, the device knows
    rows: list[int]  # of the share before, whose tokens these are


@dataclass(slots=True)
class Flight:
    """A step that was launched and not yet looked at."""

    share: Share
    drawn: Drawn
    began_ns: int


class Part(Protocol):
    """One kind of work. All methods are called from the loop's thread."""

    @property
    def held(self) -> int:
        """Sequences taken and not let go."""
        ...

    @property
    def waiting(self) -> int:
        """Of ``held``, those not yet begun: they hold no blocks."""
        ...

    @property
    def growing(self) -> int:
        """Of those begun, who will need more blocks here."""
        ...

    def attempt_of(self, request: RequestId) -> int | None:
        """The attempt that is here, if one is."""
        ...

    def begin(self, slots: int, growing: int) -> None:
        """Begin the longest waiting: at most ``slots``, and as many as leave a block for each of
        ``growing`` sequences and of those that begin."""
        ...

    def on_moved(self, moved: Moved) -> None:
        """A move has ended, perhaps another part's."""
        ...

    def sequences(self, *, computing: bool) -> list[Computed]:
        """All that are held, or those that the next step may compute."""
        ...

    def preempt(self, request: RequestId, attempt: int) -> None: ...
    def cancel(self, cancel: Cancel) -> None: ...
    def give_up(self) -> None: ...
    def drain(self) -> None: ...


class PromptPart(Part, Protocol):
    def take(self, dispatch: Dispatch) -> None: ...
    def share(self, budget_tokens: int, *, beside_streams: bool) -> Share | None:
        """Chunks for the next step, at most so many tokens together; where streams wait for it, at
        most as much work as so many tokens at the beginning of a prompt."""
        ...


class StreamPart(Part, Protocol):
    def take(self, handoff: Handoff) -> None: ...
    def refuse(self, handoff: Handoff) -> None:
        """A later attempt is here: nobody will read these blocks."""
        ...

    def share(self, growing: int) -> Share | None:
        """The next token of everything that runs, and more where drafts are worth it and leave a
        block for each of ``growing`` sequences."""
        ...

    def attained(self) -> tuple[Attained, ...]: ...


class EngineLoop:
    def __init__(
        self,
        workplace: Workplace,
        runner: Runner,
        settings: PoolConfig,
        *,
        prompts: PromptPart,
        streams: StreamPart,
        clock: Clock = monotonic,
    ) -> None:
        self._workplace = workplace
        self._device = workplace.device
        self._runner = runner
        self._prompts = prompts
        self._streams = streams
        self._parts: tuple[Part, ...] = (prompts, streams)
        self._clock = clock
        self._step_ahead = settings.step_ahead
        self._flight: Flight | None = None
        self._running_max = settings.running_max
        self._chunk_tokens = max(settings.chunk_tokens, workplace.block_tokens)
        self._mixed_chunk_tokens = min(
            self._chunk_tokens, max(settings.mixed_chunk_tokens, workplace.block_tokens)
        )
        self._attained_ns = clock()
        self._failed_steps = 0  # one after the other
        self._expired_ns = clock()
        self._unix_zero_ms = steady_unix_ms() - monotonic() // MS  # once: the wall clock may be set

    @property
    def pool(self) -> BlockPool:
        return self._workplace.pool

    @property
    def _mover(self) -> Mover:
        return self._device.mover

    # ── Loop ─────────────────────────────────────────────────────────────────────────────────────

    def handle(self, message: Dispatch | Handoff | Resume | Preempt | Cancel | GiveUp) -> None:
        self._workplace.stirred = True
        match message:
            case Dispatch():
                if self._held_attempt(message.request) is None:
                    self._prompts.take(message)
            case Handoff():
                self._take_over(message)
            case Resume():
                self._workplace.counters["resumed"] += 1
                self._take_over(message.handoff)
            case Preempt():
                stopped = self._prompts if message.phase is Phase.PREFILLING else self._streams
                stopped.preempt(message.request, message.attempt)
            case Cancel():
                # One that overtook its hand-off finds nothing; the router, told that the request
                # was adopted, says it again.
                for part in self._parts:
                    part.cancel(message)
            case GiveUp():
                for part in self._parts:
                    part.give_up()
                self._device.pool.tell_anew()
            case _:
                assert_never(message)

    def step(self) -> list[Output]:
        self._workplace.stirred = False
        for moved in self._device.collect():
            self._workplace.stirred = True
            for part in self._parts:
                part.on_moved(moved)
        self._expire()
        for part in (self._streams, self._prompts):  # who has begun to answer goes first
            if part.waiting:
                self._begin(part)
        if self._workplace.has_outputs():
            self._workplace.stirred = True  # others wait for these: they do not wait for a step
        else:
            self._compute_or_fail()
        return self._workplace.take_outputs()

    def busy(self) -> bool:
        return self._workplace.stirred or self._workplace.has_outputs() or self._mover.ready()

    def load(self) -> Load:
        held = self._prompts.held + self._streams.held
        waiting = self._prompts.waiting + self._streams.waiting
        load = self._device.load(running=held - waiting, waiting=waiting, attained=self._attained())
        if self._device.pool.has_changes:  # there is more to tell than one load holds
            self._workplace.stirred = True
        return load

    def drain(self) -> None:
        self._workplace.stirred = True
        for part in self._parts:
            part.drain()

    def wake_by(self, wake: Callable[[], None]) -> None:
        self._mover.wake = wake

    def close(self) -> None:
        self._mover.close()
        self._workplace.masks.close()

    def _expire(self) -> None:
        """Drop what nobody waits for any more. The router says so to the client, and to us; but its
        word may be late, and what is late already need not be computed."""
        now_ns = self._clock()
        if now_ns - self._expired_ns < EXPIRE_EVERY_NS:
            return
        self._expired_ns = now_ns
        now_unix_ms = self._unix_zero_ms + now_ns // MS
        for part in self._parts:
            for sequence in part.sequences(computing=False):
                request = sequence.request
                if 0 < request.deadline_unix_ms <= now_unix_ms:  # 0 where no router gave it out
                    part.cancel(Cancel(request.request, request.attempt))
                    self._workplace.counters["expired"] += 1

    # ── one step ─────────────────────────────────────────────────────────────────────────────────

    def _begin(self, part: Part) -> None:
        growing = self._prompts.growing + self._streams.growing
        # Streams on their way out have their slot no more; their blocks are another matter.
        begun = self._prompts.held - self._prompts.waiting + self._streams.growing
        part.begin(max(0, self._running_max - begun), growing)

    def _compute_or_fail(self) -> None:
        """A step that raises costs its requests this attempt, and nobody else anything."""
        try:
            self._compute()
        except Exception as error:
            self._failed_steps += 1
            if ends_worker(error) or self._failed_steps >= FAILED_STEPS_MAX:
                raise
            log.exception("a step of %s failed", self._workplace.worker)
            self._flight = None
            self._fail_step(error)

    def _fail_step(self, error: Exception) -> None:
        self._workplace.stirred = True
        self._workplace.counters["steps_failed"] += 1
        sequences = [
            sequence for part in self._parts for sequence in part.sequences(computing=True)
        ]
        said = StepFailed(f"a step of {self._workplace.worker} raised {error!r}")
        alone = alone_in_step([sequence.request.deaths for sequence in sequences])
        for sequence, is_alone in zip(sequences, alone, strict=True):
            self._workplace.say_failed(sequence, said, alone=is_alone)
            self._workplace.offer_blocks(sequence)  # what earlier steps computed
            request = sequence.request
            for part in self._parts:
                if part.attempt_of(request.request) is not None:
                    part.cancel(Cancel(request.request, request.attempt))

    def _compute(self) -> None:
        if self._flight is not None:
            self._land(self._flight)
            return
        shares = self._shares()
        if not shares:
            return
        self._workplace.stirred = True
        began_ns = self._clock()
        told = next((share.told for share in shares if share.told is not None), None)
        logits = self._runner.step([run for share in shares for run in share.runs], None, told)
        counts: list[int] = []
        rows: list[SamplerRow] = []
        for share in shares:
            rows += share.rows
            counts.append(len(rows))
        if self._step_ahead and len(shares) == 1 and shares[0].after and all(map(is_plain, rows)):
            self._flight = Flight(shares[0], Drawn(logits), began_ns)
            return
        wait_for(logits)  # the router judges speeds by this step's time
        tokens = sample(logits, rows) if rows else []
        time = StepTime((self._clock() - began_ns) // US, shared=len(shares) > 1)
        first = 0
        for share, end in zip(shares, counts, strict=True):
            self._done(share, tokens[first:end], time)
            first = end
        self._count_step(self._clock() - began_ns)

    def _land(self, flight: Flight) -> None:
        """Launch what follows, then look at what was in flight."""
        self._workplace.stirred = True
        self._flight = self._launched_after(flight)
        tokens = flight.drawn.tokens()
        now_ns = self._clock()
        if self._flight is not None:
            self._flight.began_ns = now_ns  # up to now the device was busy with the one before
        self._done(flight.share, tokens, StepTime((now_ns - flight.began_ns) // US, shared=False))
        self._count_step(now_ns - flight.began_ns)

    def _launched_after(self, flight: Flight) -> Flight | None:
        assert flight.share.after is not None
        # A prompt comes in by a step that it shares.
        following = None if self._prompts.held else flight.share.after()
        if following is None:
            return None
        logits = self._runner.step(following.share.runs, flight.drawn.of(following.rows))
        return Flight(following.share, Drawn(logits), self._clock())

    def _done(self, share: Share, tokens: Sequence[Token], time: StepTime) -> None:
        self._workplace.counters["tokens_generated"] += share.on_done(tokens, time)

    def _count_step(self, elapsed_ns: int) -> None:
        self._failed_steps = 0
        self._workplace.counters["steps"] += 1
        self._workplace.counters["step_us_total"] += elapsed_ns // US

    def _shares(self) -> list[Share]:
        streams = self._streams.share(self._prompts.growing + self._streams.growing)
        budget = self._mixed_chunk_tokens if streams else self._chunk_tokens
        prompts = self._prompts.share(budget, beside_streams=streams is not None)
        return [share for share in (streams, prompts) if share is not None]

    # ── attempts ─────────────────────────────────────────────────────────────────────────────────

    def _take_over(self, handoff: Handoff) -> None:
        held = self._held_attempt(handoff.request)
        if held is None and not self._workplace.turns_away(handoff):
            self._streams.take(handoff)
        elif held is None or held > handoff.request.attempt:
            self._streams.refuse(handoff)
        # Else it was told twice.

    def _held_attempt(self, request: Request) -> int | None:
        """The attempt that is here already, this one or a later; earlier ones are let go."""
        for part in self._parts:
            held = part.attempt_of(request.request)
            if held is not None:
                if held >= request.attempt:
                    return held
                part.cancel(Cancel(request.request, held))
        return None

    def _attained(self) -> tuple[Attained, ...]:
        now_ns = self._clock()
        if now_ns - self._attained_ns < ATTAINED_EVERY_NS:
            return ()
        self._attained_ns = now_ns
        return self._streams.attained()
