"""I6, counted again from what clients saw: who waits has a claim by an instant that is known before
anything is asked, and the claims before it are paid for one after the other.

    first token ≤ due + (claims before it) / share + two pieces of work + own prefill

``due`` is ``rescue_after_ms + rescue_ratio · own prefill`` after it was asked. The two pieces are
the one that runs when its turn comes and the one that is sent ahead to the worker. Nothing of it is
asked of the router, so a router that states no bound, or begins to count anew, is caught too.
"""

import math
from collections.abc import Sequence

from pdserve.clock import MS
from tests.simulation.clients import Asked
from tests.simulation.shape import Shape
from tests.simulation.worker import STEP_NS, TOKEN_NS

WRONG_RATIO = 4 / 3
"""A router believes in a pace that is not so in the beginning, and takes claims for shorter than
they are: so many times as long may anybody wait."""


def starved(asked: Sequence[Asked], shape: Shape, *, slow: int, chunk_tokens: int) -> str | None:
    """Who had its first token later than its bound, and by how much; None: nobody had.

    Args:
        asked: of one worker that does nothing else, all of one token, all answered.
        slow: how many times as long as it should a step takes.
        chunk_tokens: that a step computes at most.
    """
    config = shape.config().router
    works_ns = {each.name: _work_ns(each.length, slow, chunk_tokens) for each in asked}

    def due_ns(each: Asked, wrong: float = 1.0) -> int:
        ratio = config.rescue_ratio / wrong
        return each.began_ns + round(config.rescue_after_ms * MS + ratio * works_ns[each.name])

    firsts_ns = {each.name: each.first_ns for each in asked if each.first_ns is not None}
    starts_ns = {name: first_ns - works_ns[name] for name, first_ns in firsts_ns.items()}
    # Whose claim is before whose is decided by what was predicted of them.
    paid = [other for other in asked if starts_ns[other.name] > due_ns(other, WRONG_RATIO)]
    for each in (one for one in asked if starts_ns[one.name] > due_ns(one)):
        before = [other for other in paid if due_ns(other, WRONG_RATIO) <= due_ns(each)]
        debt_ns = sum(works_ns[other.name] for other in before if other is not each)
        paid_ns = min(map(due_ns, before)) + round(debt_ns / config.rescue_share)
        piece_ns = max(work_ns for name, work_ns in works_ns.items() if name != each.name)
        bound_ns = max(due_ns(each), paid_ns) + 2 * piece_ns + works_ns[each.name] - each.began_ns
        waited_ns = firsts_ns[each.name] - each.began_ns
        if waited_ns > WRONG_RATIO * bound_ns:
            return f"{each.name} waited {waited_ns // MS} ms, its bound is {bound_ns // MS}"
    return None


def _work_ns(length: int, slow: int, chunk_tokens: int) -> int:
    """A prefill, of which nothing is cached, alone at the worker."""
    return (math.ceil(length / chunk_tokens) * STEP_NS + length * TOKEN_NS) * slow
