"""Which decode worker a prompt's KV goes to, once it is known where it is prefilled: the near ones
have a shorter way, others may have shorter steps.

    price(d) = way(prefill, d) + steps × step at d

The *place* of a host is a path of labels, coarse to fine: (zone, rack). Two workers on one host
need no network, so their way costs nothing; in the same rack it is one hand-off of the cost model;
and it is ``far_ratio`` times as long for every level at which the paths differ, so in another zone,
where racks differ too, twice. A host that does not say where it is is as far away as can be.

Prices are of one request, and how many steps it takes is not known: ``STEPS_MAX`` at most count, so
that a long answer, which nobody has promised, does not outweigh a way that is certain.
"""

import numpy as np

from pdserve.ids import HostId
from pdserve.router.fleet import Fleet
from pdserve.router.slot_arrays import Floats
from pdserve.router.worker import Worker

STEPS_MAX = 128

Place = tuple[str, ...]


def hand_offs(one: Place, other: Place, *, same_host: bool, far_ratio: float) -> float:
    """The way between two hosts, in hand-offs of the cost model.

    >>> hand_offs(("z", "r1"), ("z", "r2"), same_host=False, far_ratio=2.0)
    2.0
    """
    if same_host:
        return 0.0
    levels = max(len(one), len(other))
    shared = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs or not mine:
            break
        shared += 1
    return float(far_ratio ** (levels - shared))


def nearest(
    fleet: Fleet,
    prefill: Worker,
    decode: Worker,
    fits: Floats,
    *,
    tokens: int,
    max_tokens: int,
) -> Worker:
    """Who should decode what ``prefill`` computes: ``decode`` unless another's price is lower.

    Args:
        decode: the one with the shortest step.
        tokens: whose KV is handed over.
        fits: predicted steps, in ns, by slot; infinite where it may not go.
    """
    way_ns = fleet.costs.handoff_ns(tokens)
    steps = min(max_tokens, STEPS_MAX)
    prices = steps * fits + way_ns * distances(fleet, prefill)
    best = int(prices.argmin())
    return fleet.at(best) if prices.item(best) < prices.item(decode.slot) else decode


def distances(fleet: Fleet, prefill: Worker) -> Floats:
    """Of every slot from that worker, in hand-offs; remembered until somebody comes or goes."""
    known = fleet.distances.get(prefill.slot)
    if known is None:
        known = np.zeros(len(fleet.step_ns))
        for worker in fleet.all():
            known[worker.slot] = hand_offs(
                prefill.hello.place,
                worker.hello.place,
                same_host=_host(worker) == _host(prefill),
                far_ratio=fleet.far_ratio,
            )
        fleet.distances[prefill.slot] = known
    return known


def _host(worker: Worker) -> HostId:
    return worker.hello.address.host
