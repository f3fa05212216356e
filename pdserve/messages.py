"""What processes say to each other. Frozen values; nothing here moves data or decides anything.

    gateway ──Submit, Cancel──► router ──Dispatch, Preempt, Cancel──► prefill
                                  │ ▲                                    │ Handoff
                 Refused, Lost ◄──┘ └── Hello, Report, Parked ──┐        ▼
    gateway ◄───────────────── TokenBatch ─────────────────── decode ◄──Resume── router

Only dataclasses, enums, tuples, dicts of plain values and optional fields: ``wire.codec`` turns
them into msgpack and checks every type on the way back. Those made for every request or report are
frozen to the type checker alone (``values``). KV never travels in a message, only who has it where.

Token indices: ``tokens[:prompt_tokens]`` is the client's prompt; what follows was generated.
*Offset* 0 is the first generated token of the request, over all attempts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pdserve.clock import SinceUs, SteadyMs
from pdserve.errors import ErrorInfo
from pdserve.ids import BlockKey, HostId, RequestId, StoreId, TicketId, WorkerId
from pdserve.lifecycle import Event, Phase
from pdserve.prompt_tasks import Pooling, Scoring
from pdserve.values import value


@dataclass(frozen=True, slots=True)
class Address:
    """Where a process listens. A peer with the same ``host`` uses the Unix socket."""

    host: HostId
    unix_path: str
    tcp: str  # "ip:port", or "" when it listens on this host only


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class ServiceClass(StrEnum):
    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"


class FinishReason(StrEnum):
    STOP = "stop"  # a stop token, the end-of-sequence token, or a stop string
    LENGTH = "length"  # max_tokens, or the model's context is full
    CANCELLED = "cancelled"
    ERROR = "error"


class ConstraintKind(StrEnum):
    """In which language ``Constraint.text`` is."""

    JSON_SCHEMA = "json_schema"  # the answer is a JSON value that the schema allows
    REGEX = "regex"  # the whole answer matches
    CHOICE = "choice"  # a JSON list of texts: the answer is one of them
    LARK = "lark"  # a grammar with a rule ``start``


@dataclass(frozen=True, slots=True)
class Constraint:
    """What texts an answer may be. Pure data; ``text.grammar`` compiles it."""

    kind: ConstraintKind
    text: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one token is drawn from the logits. Pure data; the arithmetic is in ``model.sampler``."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    min_p: float = 0.0  # 0 is off
    repetition_penalty: float = 1.0  # over prompt and output; 1 is off
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, added to its logit)
    logprobs: int | None = None  # None: none; k ≥ 0: the chosen token's and the k best
    no_repeat_ngram_size: int = 0  # no n tokens in a row twice, over prompt and output; 0 is off
    constraint: Constraint | None = None  # from the first generated token on


@dataclass(frozen=True, slots=True)
class Stop:
    """When a request ends."""

    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    token_ids: tuple[int, ...] = ()  # beside the model's own end-of-sequence tokens
    strings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Beams:
    """The likeliest answers are searched for, none is drawn. The search is in ``decode.beams``."""

    width: int  # unfinished answers that every step keeps
    n: int  # so many answers are given, the best first; at most ``width``
    length_penalty: float = 1.0  # an answer's score is its logprob / length ** length_penalty
    early_stopping: bool = False  # with the first ``width`` answers, though better ones may come


@value
class Request:
    """One unit of scheduling, as the gateway submits it. A second attempt carries more tokens."""

    request: RequestId
    attempt: int  # from 0; a message of an older attempt is dropped wherever it arrives
    choice: int  # index among the call's ``n``
    model: str
    tokens: tuple[int, ...]  # the prompt, then what earlier attempts delivered
    prompt_tokens: int  # how many of ``tokens`` are the prompt
    block_keys: tuple[BlockKey, ...]  # one per full block of ``tokens``
    tenant: str
    service_class: ServiceClass
    sampling: Sampling
    stop: Stop
    seed: int  # token i of choice c draws Philox(seed, c, i)
    deadline_unix_ms: SteadyMs  # on its way, the time that is left
    reply_to: Address
    adapter: str = ""  # its digest, if ``model`` is an adapter: whose KV and whose matrices
    beams: Beams | None = None  # with them the request answers for all choices of its call
    retries: int = 0  # so often the client says it has asked before
    deaths: int = 0  # workers that died computing it, since it last got any further
    task: Pooling | Scoring | None = None  # with one it ends with its prompt: nothing is generated

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def width(self) -> int:
        """Sequences that it decodes at once."""
        return self.beams.width if self.beams else 1

    @property
    def emitted_count(self) -> int:
        """Generated tokens that the client already has: the offset of the next one."""
        return self.length - self.prompt_tokens


@value
class Route:
    """The router's one decision; it travels with the request."""

    prefill: WorkerId
    decode: WorkerId
    decode_address: Address
    decode_store: Address | None  # the store node of decode's host: where prefill puts the blocks


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob), best first


@dataclass(frozen=True, slots=True)
class Token:
    token: int
    logprob: TokenLogprob | None = None


@value
class Decision:
    """Why a request went where it did, at one dispatch or resumption. For people; nothing acts on
    it. Times in microseconds, as predicted when it was taken."""

    at_unix_us: int
    reason: str  # "first done", "first done, decodes too", "bound on arrival", "resumed", …
    waited_us: int  # since it was queued, preempted or parked
    level: int
    work_us: int  # of its uncached prefill
    cached_tokens: int  # at the worker chosen
    prefill: WorkerId | None
    decode: WorkerId
    price_us: int = 0  # of the choice: wait, fetch and prefill
    others: tuple[tuple[WorkerId, int], ...] = ()  # the next best workers, and their prices


@value
class Timing:
    """Where a request's time went so far, and who spent it. Durations in microseconds.

    What goes on at another host travels as how long it has lasted: clocks are not compared.
    """

    queued_us: int = 0  # in the router, all waits together
    prefill_us: int = 0  # from dispatch to the first token, all stretches together
    step_us: int = 0  # of prefill_us, what the forward passes took
    handoff_us: int = 0  # from the first token to decode having taken over
    since_unix_us: SinceUs = 0  # when the stretch now running began; on its way, how long ago
    cached_tokens: int = 0  # prompt tokens that prefill did not compute
    preempted_count: int = 0
    parked_count: int = 0
    level: int = 0  # of the router's queue, at the last dispatch
    prefill: WorkerId | None = None
    decode: WorkerId | None = None
    decisions: tuple[Decision, ...] = ()  # the router's, oldest first


# ── anybody → router: who leads ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Seek:
    """First words on a connection, as a call: are you the router that leads? Who has heard of a
    younger epoch says so, and an older router learns from it that it was deposed."""

    epoch: int  # the youngest that the caller has heard of; 0: of none


@dataclass(frozen=True, slots=True)
class Leading:
    """The answer of the router that leads, and again about once a second: silence means trouble."""

    epoch: int
    standbys: tuple[Address, ...]  # where to look first when it is gone


@dataclass(frozen=True, slots=True)
class Following:
    """The answer of a router that does not lead; ``leader`` does, as far as it knows."""

    epoch: int
    leader: Address | None


@dataclass(frozen=True, slots=True)
class Standby:
    """Standby → leader: here I am. Peers are told where."""

    address: Address


@dataclass(frozen=True, slots=True)
class Consult:
    """Standby → leader, as a call: a control question. ``Consulted`` has its answer as the body."""

    question: str
    argument: str = ""


@dataclass(frozen=True, slots=True)
class Consulted:
    pass


# ── gateway → router ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class GatewayHello:
    address: Address


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    """The client does not want it any more. Also router → worker."""

    request: RequestId
    attempt: int | None = None  # this one and earlier ones; None: whichever is there

    def covers(self, attempt: int) -> bool:
        return self.attempt is None or attempt <= self.attempt


# ── router → gateway ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Refused:
    """This attempt will not run; ``error`` says why and when to try again."""

    request: RequestId
    attempt: int
    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker died with this attempt: submit what was delivered under the next attempt."""

    request: RequestId
    attempt: int
    worker: WorkerId
    implicated: bool = False  # the worker was computing it
    alone: bool = False  # and nothing beside it that had been in a death before


# ── router → worker ──────────────────────────────────────────────────────────────────────────────


@value
class Dispatch:
    request: Request
    route: Route
    timing: Timing
    cached_tokens: int | None = None
    """What the worker need not compute, as far as the router knows: 0 is not worth asking the
    host's store for. None: it does not know."""

    ahead_of: RequestId | None = None
    """A prompt there that lets this one go first, from its next chunk on, and keeps what is
    computed of it."""


@dataclass(frozen=True, slots=True)
class Preempt:
    """Who prefills: stop at the next chunk boundary, keep the blocks in the store, and say so. Who
    decodes: park this request. Who does not have it, is nearly done with it, or has it in another
    phase by now, ignores it."""

    request: RequestId
    attempt: int
    phase: Phase  # in which it is to be interrupted: ``PREFILLING`` or ``DECODING``


@dataclass(frozen=True, slots=True)
class FetchAhead:
    """A prompt waits in the router: the worker's store may bring up what its disk has of it."""

    block_keys: tuple[BlockKey, ...]
    tenant: str


# ── prefill → decode, decode → router → decode ───────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Handoff:
    """A request between two workers: a pointer to its blocks, and its tokens so far.

    The KV of ``tokens[:-1]`` lies in ``store`` under ``ticket``: full blocks under their keys, the
    unfinished tail block, if any, under the ticket alone. The last token's KV is not yet computed.
    """

    request: Request
    route: Route
    ticket: TicketId
    store: Address
    tokens: tuple[int, ...]  # prompt and everything generated
    block_keys: tuple[BlockKey, ...]  # of the full blocks of ``tokens[:-1]``
    unsent: tuple[Token, ...]
    """The last tokens of ``tokens``, which no gateway has been sent. Of a beam search always one:
    the best of the first candidates, and with it as ``logprob.top`` all of them."""

    timing: Timing
    namespace: str = ""  # of those blocks, in hexadecimal; "": unsaid, of the reader's own

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Resume:
    """Router → decode: take this parked request up."""

    handoff: Handoff


# ── worker → router ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a worker on a fresh connection; everything the router must know of it."""

    worker: WorkerId
    role: Role
    address: Address
    store_id: StoreId
    store: Address
    namespace: str  # digest of everything that KV blocks must agree on, in hexadecimal
    block_tokens: int
    block_count: int  # of its device pool
    running_max: int  # sequences it runs at once
    chunk_tokens: int
    pid: int
    store_has_disk: bool = False
    fetches: bool = False  # prefixes from the stores of other hosts, where that is sooner
    place: tuple[str, ...] = ()  # of its host, coarse to fine: zone, rack; empty: nobody said


@value
class Progress:
    """One thing that happened to one request at one worker."""

    request: RequestId
    attempt: int
    event: Event
    computed_tokens: int = 0  # prefill tokens computed by this worker so far, for CHUNK reports
    total_tokens: int = 0  # prompt and generated, now


@value
class ChunkDone:
    """Prefill reached a chunk boundary: the moment at which preemption is possible."""

    request: RequestId
    attempt: int
    computed_tokens: int  # of this request's tokens, KV exists for so many
    elapsed_us: int


@value
class Attained:
    """How far a decoding request has come."""

    request: RequestId
    attempt: int
    generated_tokens: int  # of all attempts together


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    """This worker cannot go on with this attempt (its blocks are gone, say); it is not dead."""

    request: RequestId
    attempt: int
    error: ErrorInfo
    alone: bool = False  # of a step that raised: as in ``Lost``


@dataclass(frozen=True, slots=True)
class Parked:
    """Decode → router: this request's KV is in the store now, resume it wherever there is room."""

    handoff: Handoff


@value
class Report:
    """A worker's load report. Sent when something changed, and at least every second.

    ``sequence`` counts a worker's reports from 0; a gap voids what was said of its pool's blocks.
    """

    worker: WorkerId
    sequence: int
    draining: bool
    running: int  # sequences in its batch, or prefills under way
    waiting: int  # taken, not yet begun
    free_blocks: int  # of the device pool, idle cached ones included
    progress: tuple[Progress, ...] = ()
    chunks: tuple[ChunkDone, ...] = ()
    attained: tuple[Attained, ...] = ()  # of what decodes here, about once a second
    blocks_added: tuple[BlockKey, ...] = ()  # to the device pool's prefix cache
    blocks_removed: tuple[BlockKey, ...] = ()
    store_added: tuple[BlockKey, ...] = ()  # to the host's store, by this worker or seen by it
    store_removed: tuple[BlockKey, ...] = ()
    counters: Mapping[str, int] = field(default_factory=dict)
    store_anew: bool = False  # what was said of the store before this report is void


@dataclass(frozen=True, slots=True)
class Goodbye:
    """Worker → router: it has drained and leaves. Router → worker, which drains: nothing is bound
    to it any more, nor will be."""

    worker: WorkerId


# ── decode (or, for a request that ends with its first token, prefill) → gateway ─────────────────


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """The next tokens of one request. Exactly-once by (request, attempt, offset)."""

    request: RequestId
    attempt: int
    offset: int  # of tokens[0], among the generated tokens of the request
    tokens: tuple[Token, ...]
    finish: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token that ended it
    error: ErrorInfo | None = None  # with finish == ERROR
    timing: Timing | None = None  # with the first tokens and with the last
    hypothesis: int = 0  # of a beam search: whose tokens these are, counted from the best


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """What one step has for one gateway, all its requests together."""

    worker: WorkerId
    deltas: tuple[TokenDelta, ...]
