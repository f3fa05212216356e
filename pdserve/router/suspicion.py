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
"""

from collections.abc import Iterable

from pdserve.lifecycle import Phase
from pdserve.router.entry import Entry
from pdserve.suspicion import GUILTY_DEATHS, PROGRESS_TOKENS


def implicated(entries: Iterable[Entry], worker: str) -> list[Entry]:
    """Those that a worker was, or may have been, computing when it died."""
    decoding = (Phase.HANDING_OFF, Phase.DECODING)
    return [
        entry
        for entry in entries
        if (entry.phase is Phase.PREFILLING and entry.prefill == worker)
        or (entry.phase in decoding and entry.decode == worker)
    ]


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
