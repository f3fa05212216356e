"""A request on its way out of its line: where it goes, and the message that says so."""

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.clock import MS
from pdserve.errors import ErrorInfo, OutOfBlocks, PromptTooLong
from pdserve.lifecycle import Event
from pdserve.messages import Dispatch, Refused, Route
from pdserve.router.commands import Command, ToGateway, ToWorker
from pdserve.router.endings import drop
from pdserve.router.entry import Entry
from pdserve.router.placement import Choice, Deferred, blocks_of, place
from pdserve.router.state import RouterState
from pdserve.router.suspicion import must_wait
from pdserve.router.worker import Worker

OUT_OF_BLOCKS_RETRY_MS = 1000


class Send:
    """It goes to a worker. No dataclass, for the reason of ``Choice``."""

    __slots__ = ("choice", "entry", "passed")

    def __init__(self, entry: Entry, choice: Choice, passed: Sequence[Entry]) -> None:
        self.entry = entry
        self.choice = choice
        self.passed = passed  # better placed in the queue, but they fit nowhere yet


@dataclass(frozen=True, slots=True)
class Refuse:
    """It fits into no decode worker, however empty."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Again:
    """Somebody's work is another than believed, and the order with it."""


def placed(
    state: RouterState, entry: Entry, now_ns: int, *, only: Worker | None
) -> Choice | Deferred | Again | None:
    """Where it goes, as ``place`` says, if its work is what it was believed to be."""
    if state.suspects and must_wait(entry, state.suspects.values()):
        return None
    hits = state.hits(entry)
    if state.reconsider(entry, hits, now_ns):
        return Again()
    tpot_slo_ms = state.settings.tpot_slo_ms
    return place(
        state.fleet,
        entry,
        hits,
        block_tokens=state.fleet.block_tokens,
        tpot_slo_ns=None if tpot_slo_ms is None else tpot_slo_ms * MS,
        only=only,
        now_ns=now_ns,
    )


def take(state: RouterState, step: Send | Refuse | Again, now_ns: int) -> list[Command]:
    """Enter the step in the books; what has to be said because of it."""
    if isinstance(step, Again):
        return []
    entry = step.entry
    if isinstance(step, Refuse):
        return refuse_hopeless(state, entry, entry.total_tokens, now_ns)
    choice = step.choice
    for other in step.passed:
        other.passed_over += 1
    timing = state.dispatch(entry, choice, now_ns)
    decode = choice.decode
    route = Route(choice.prefill.id, decode.id, decode.hello.address, decode.hello.store)
    # An earlier attempt may have left more in a store than has been reported yet.
    cached_tokens = None if entry.request.attempt else choice.cached_tokens
    dispatch = Dispatch(entry.request, route, timing, cached_tokens, choice.ahead_of)
    return [ToWorker(choice.prefill.id, dispatch)]


def is_hopeless(state: RouterState, entry: Entry, tokens: int) -> bool:
    """Whether there are decode workers, and it would not fit into any of them, however empty."""
    fleet = state.fleet
    return tokens + entry.beam_blocks * fleet.block_tokens >= fleet.largest_tokens > 0


def refuse_hopeless(state: RouterState, entry: Entry, tokens: int, now_ns: int) -> list[Command]:
    """Tell the client what is too long, its prompt or its answer so far."""
    largest = state.fleet.largest
    assert largest is not None
    error: OutOfBlocks | PromptTooLong
    if tokens > entry.request.prompt_tokens or entry.beam_blocks:
        error = OutOfBlocks(
            blocks_of(tokens + 1, largest.block_tokens) + entry.beam_blocks,
            largest.block_count,
            retry_after_ms=OUT_OF_BLOCKS_RETRY_MS,
        )
    else:
        error = PromptTooLong(tokens, largest.block_count * largest.block_tokens)
    refused = Refused(entry.id, entry.request.attempt, ErrorInfo.of(error))
    commands = drop(state, entry, Event.GAVE_UP, "refused", now_ns)
    return [*commands, ToGateway(entry.request.reply_to, refused)]
