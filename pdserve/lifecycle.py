"""The life of a request, as a table.

A request's phase changes through ``advance`` and in no other way. This file has no clock, no queue
and no GPU: all it knows is what may follow what.

    QUEUED ──> PREFILLING ──> HANDING_OFF ──> DECODING ──> FINISHED
     │  ^           │ │            │           │    ^
     │  └ PREEMPTED ┘ └─ FINISHED  │           v    │
     │                             │         PARKED ┘ RESUMED
     └──────────────── WORKER_LOST: back to QUEUED from anywhere between

and from each of these, CLIENT_GONE ──> ABORTED and GAVE_UP ──> FAILED.

Losing a worker is not an error path of its own: the request goes back to QUEUED with the tokens it
has, and the blocks that reached the store make the second prefill short. Being preempted is the
same edge, walked on purpose. Recovery is admission, again.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from pdserve.errors import IllegalTransition


class Phase(StrEnum):
    __hash__ = str.__hash__  # that of ``Enum`` is interpreted: most of the time ``advance`` took

    QUEUED = "queued"  # admitted by the router, waiting in one of its levels
    PREFILLING = "prefilling"  # a prefill worker computes prompt tokens
    HANDING_OFF = "handing_off"  # all KV blocks are in the store; decode has not taken them yet
    DECODING = "decoding"  # a decode worker holds the blocks and emits tokens
    PARKED = "parked"  # its blocks are in the store, and no worker runs it
    FINISHED = "finished"  # stop token, stop string or token limit
    ABORTED = "aborted"  # the client went away, or cancelled
    FAILED = "failed"  # gave up; the client has been told why


class Event(StrEnum):
    __hash__ = str.__hash__

    DISPATCHED = "dispatched"  # the router sent it to a prefill worker
    PREEMPTED = "preempted"  # stopped at a chunk boundary; its blocks stay as a cached prefix
    PREFILL_DONE = "prefill_done"  # sealed, and decode has been told
    ADOPTED = "adopted"  # decode holds the blocks
    PARKED = "parked"  # decode put its blocks back into the store
    RESUMED = "resumed"  # a decode worker was told to take it up again
    ENDED = "ended"  # the last token is out
    WORKER_LOST = "worker_lost"
    CLIENT_GONE = "client_gone"
    GAVE_UP = "gave_up"


_ENDINGS = {Event.CLIENT_GONE: Phase.ABORTED, Event.GAVE_UP: Phase.FAILED}

_TABLE: dict[Phase, dict[Event, Phase]] = {
    Phase.QUEUED: {Event.DISPATCHED: Phase.PREFILLING, **_ENDINGS},
    Phase.PREFILLING: {
        Event.PREEMPTED: Phase.QUEUED,
        Event.PREFILL_DONE: Phase.HANDING_OFF,
        Event.ENDED: Phase.FINISHED,  # the first token was also the last
        Event.WORKER_LOST: Phase.QUEUED,
        **_ENDINGS,
    },
    Phase.HANDING_OFF: {
        Event.ADOPTED: Phase.DECODING,
        Event.PARKED: Phase.PARKED,  # decode had no room after all
        Event.WORKER_LOST: Phase.QUEUED,
        **_ENDINGS,
    },
    Phase.DECODING: {
        Event.PARKED: Phase.PARKED,
        Event.ENDED: Phase.FINISHED,
        Event.WORKER_LOST: Phase.QUEUED,
        **_ENDINGS,
    },
    Phase.PARKED: {
        Event.RESUMED: Phase.HANDING_OFF,
        Event.WORKER_LOST: Phase.QUEUED,  # the store node that held its blocks
        **_ENDINGS,
    },
    Phase.FINISHED: {},
    Phase.ABORTED: {},
    Phase.FAILED: {},
}

TRANSITIONS: Mapping[Phase, Mapping[Event, Phase]] = MappingProxyType(_TABLE)

TERMINAL = frozenset({Phase.FINISHED, Phase.ABORTED, Phase.FAILED})


def advance(phase: Phase, event: Event) -> Phase:
    """The phase that follows ``phase`` on ``event``.

    Raises:
        IllegalTransition: the pair is not in the table. Always a bug: of the sender (an event
            sent twice) or of the table.
    """
    try:
        return TRANSITIONS[phase][event]
    except KeyError:
        allowed = ", ".join(TRANSITIONS[phase]) or "none, it is terminal"
        raise IllegalTransition(f"{event} while {phase} (allowed: {allowed})") from None
