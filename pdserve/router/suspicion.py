"""Which request workers die of: a death says only that it was one of those computed.

A request is *implicated* when a worker dies, or its step raises, while it computes the request.
Most who are implicated are innocent, and an innocent one gets further on the next worker. So the
gateway, which knows what was delivered, counts deaths *in one place*: its count begins anew once
the request has come ``PROGRESS_TOKENS`` further. Computation is deterministic, so the guilty never
do.

    count 1                goes on at once, like everybody whom a death interrupts; but of those
                           who have no token yet, no two are prefilled at once
    count 2, and alone     guilty: nobody beside it had been in as many deaths in one place
    count 2, in company    tried: of those with such a count one runs at a time, so the next death
                           finds it alone, or it gets further and is cleared

So one guilty request among innocent ones costs two workers, or three where it died twice in the
same company; and nobody who gets further is ever refused for it.

Several workers may die at once, of their host. The router hears of them one after the other, and
sends whoever was on the first to the second, which is gone already. So a further death counts only
where the worker had said that it has the request, which it says of one with deaths before it
computes it (``cluster.worker_shell``). The first death counts in any case: nobody is refused for
one.

A worker that falls silent accuses nobody. Its process was stopped by somebody, or its host is
starved or cut off: from afar it all looks alike, and requests do none of it. What they can do is
make an engine hang, which its process notices by itself, says, and hangs up: that counts. Should
one ever hold up a whole process, reports and all, it is tried ``attempts_max`` times, and no more.
"""

from collections.abc import Iterable

from pdserve.ids import WorkerId
from pdserve.lifecycle import Phase
from pdserve.router.entry import Entry
from pdserve.suspicion import GUILTY_DEATHS, PROGRESS_TOKENS


def implicated(entries: Iterable[Entry], worker: WorkerId) -> list[Entry]:
    """Those that a worker was, or may have been, computing when it died."""
    return [entry for entry in entries if _may_compute(entry, worker)]


def _may_compute(entry: Entry, worker: WorkerId) -> bool:
    match entry.phase:
        case Phase.DECODING:
            return entry.decode == worker
        case Phase.PREFILLING:
            is_there = entry.prefill == worker
        case Phase.HANDING_OFF:
            is_there = entry.decode == worker
        case _:
            return False
    return is_there and (entry.request.deaths == 0 or worker in entry.vouched_by)


def deaths_in_place(entry: Entry) -> int:
    """Those before this attempt, as far as it has not come further since."""
    further = entry.generated_tokens - entry.request.emitted_count
    return 0 if further > PROGRESS_TOKENS else entry.request.deaths


def must_wait(entry: Entry, suspects: Iterable[Entry]) -> bool:
    """Whether it would run in company that hides who is guilty."""
    deaths = entry.request.deaths
    if deaths == 0:
        return False
    others = [other for other in suspects if other is not entry and deaths_in_place(other) > 0]
    if deaths >= GUILTY_DEATHS:
        return any(
            other.request.deaths >= GUILTY_DEATHS and other.phase is not Phase.QUEUED
            for other in others
        )
    return entry.request.emitted_count == 0 and any(
        other.request.emitted_count == 0 and other.phase is Phase.PREFILLING for other in others
    )
