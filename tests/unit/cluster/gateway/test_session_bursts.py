"""What a call's consumer is given at once: all that is ready, and in time an end."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.clock import unix_ms
from pdserve.cluster.gateway.calls import Call, Piece
from pdserve.cluster.gateway.session import (
    BURST_MAX,
    DEADLINE_GRACE_S,
    _expire_in_time,
    _ready,
    _Running,
)
from pdserve.errors import DeadlineExceeded, PdserveError, WorkerLost
from pdserve.messages import Sampling, ServiceClass, Stop

LONG_MS = 600_000


def running(deadline_unix_ms: int = 0) -> _Running:
    call = Call(
        "x", (1,), 1, Sampling(), Stop(9), None, "t", ServiceClass.STANDARD, deadline_unix_ms
    )
    return _Running(call, seed=1)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def texts(pieces: Sequence[Piece]) -> list[str]:
    return [piece.text for piece in pieces]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=50), st.booleans())
def test_all_that_is_ready_comes_in_order_and_the_error_behind_it(
    said: list[str], fails: bool
) -> None:
    async def scenario() -> None:
        here = running()
        error = WorkerLost("gone") if fails else None
        for text in said:
            here.pieces.put_nowait(Piece(0, text, ()))
        if error is not None:
            here.pieces.put_nowait(error)
        pieces, found = await _ready(here)
        assert texts(pieces) == said
        assert found is error
        assert here.pieces.empty()

    run(scenario())


def test_a_burst_has_a_bound_and_the_next_one_goes_on_behind_it() -> None:
    async def scenario() -> None:
        here = running()
        for index in range(BURST_MAX + 1):
            here.pieces.put_nowait(Piece(0, str(index), ()))
        first, error = await _ready(here)
        assert error is None
        second, _ = await _ready(here)
        assert texts([*first, *second]) == [str(index) for index in range(BURST_MAX + 1)]
        assert (len(first), len(second)) == (BURST_MAX, 1)

    run(scenario())


def test_without_anything_it_waits_for_the_first() -> None:
    async def scenario() -> None:
        here = running()
        waiting = asyncio.create_task(_ready(here))
        await asyncio.sleep(0)
        assert not waiting.done()
        here.pieces.put_nowait(Piece(0, "a", ()))
        pieces, error = await waiting
        assert (texts(pieces), error) == (["a"], None)

    run(scenario())


def test_a_call_beyond_its_deadline_and_the_grace_ends() -> None:
    async def scenario() -> None:
        here = running(unix_ms() - round(DEADLINE_GRACE_S * 1000))
        _expire_in_time(here)
        pieces, error = await _ready(here)
        assert pieces == []
        assert isinstance(error, DeadlineExceeded)
        with pytest.raises(PdserveError, match="x was not finished within its deadline"):
            raise error

    run(scenario())


def test_a_call_within_its_deadline_does_not_end() -> None:
    async def scenario() -> None:
        here = running(unix_ms() + LONG_MS)
        expiry = _expire_in_time(here)
        left_s = expiry.when() - asyncio.get_running_loop().time()
        assert LONG_MS / 1000 - 60 < left_s <= LONG_MS / 1000 + DEADLINE_GRACE_S
        expiry.cancel()

    run(scenario())
