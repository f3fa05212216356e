"""How long a gateway that was asked to end goes on. Pure: instants come in, a span goes out.

    a call is under way     as long as a router leads: what one worker cannot finish another one
                            will. Without a router nobody recovers anything, and probably the whole
                            cluster is ending: ``UNLED_NS`` more, for what decode still streams.
    nothing, but there are  ``LINGER_NS``: on a connection that a client keeps for its next request,
    connections             one may be on its way. It is answered, and told to go elsewhere.
    nothing at all          not a moment

and never longer than the cluster's ``drain_timeout_s``.

HTTP's clients are told to go elsewhere with an answer. gRPC's core can tell that (GOAWAY) to a
connection that has reached an age which is set when its server starts; at no other time, but as it
stops, when it ends what arrives with a bare CANCELLED. So all of gRPC's connections have an age,
at which their clients open new ones and lose nothing: young enough that each is reached while its
gateway drains.
"""

from dataclasses import dataclass

from pdserve.clock import S

UNLED_NS = 5 * S
LINGER_NS = 1 * S

CONNECTION_AGE_NS_MAX = 30 * S
CONNECTION_AGE_NS_MIN = 1 * S
"""A client that asks all the time pays for a connection so often."""


@dataclass(frozen=True, slots=True)
class Seen:
    """By a gateway that leaves; instants of one steady clock."""

    asked_ns: int  # when it was asked to end
    led_ns: int  # when it was connected to the router that leads, at the latest
    busy_ns: int  # when a call was under way, at the latest
    is_busy: bool  # a call is under way now
    has_connections: bool  # of clients, idle ones too


def left_ns(seen: Seen, *, limit_ns: int, now_ns: int) -> int:
    """How long it goes on, should nothing change; 0: it ends now."""
    if not (seen.is_busy or seen.has_connections):
        return 0
    until_ns = min(seen.asked_ns + limit_ns, max(seen.asked_ns, seen.led_ns) + UNLED_NS)
    if not seen.is_busy:
        until_ns = min(until_ns, max(seen.asked_ns, seen.busy_ns) + LINGER_NS)
    return max(0, until_ns - now_ns)


def connection_age_ns(*, limit_ns: int) -> int:
    """When clients of gRPC are asked to open a new connection. gRPC's core takes up to a tenth
    more or less; both lie within ``limit_ns``, a gateway's time to drain, if it is 2 s or more."""
    return min(max(limit_ns // 2, CONNECTION_AGE_NS_MIN), CONNECTION_AGE_NS_MAX)
