"""Who misses tokens asks again from there; who only waits for a moment does not.

The first case was found by ``tests.simulation``: what a worker had generated before it parked a
request did not reach the gateway, and the router knew only the worker that took it up.
"""

import asyncio
from collections.abc import Callable

import pytest

from pdserve.cluster.gateway import gaps
from pdserve.cluster.gateway.session import GatewaySession
from pdserve.messages import FinishReason, Request, Token, TokenDelta
from tests.unit.cluster.gateway.test_session_prompts import Gateway, call


def said(gateway: GatewaySession, request: Request, offset: int, *tokens: int) -> None:
    finish = FinishReason.LENGTH if offset + len(tokens) == 4 else None
    delta = TokenDelta(
        request.request, request.attempt, offset, tuple(map(Token, tokens)), finish=finish
    )
    gateway._on_delta(delta)


def submitted_after(
    monkeypatch: pytest.MonkeyPatch, *events: Callable[[Gateway, Request], None]
) -> list[Request]:
    """What a call has submitted in the end; behind each event passes the time that gaps may last.
    The last event has to end the call."""
    monkeypatch.setattr(gaps, "GAP_S", 0.0)

    async def run() -> list[Request]:
        gateway = Gateway()

        async def drain() -> None:
            async for _ in gateway.generate(call(None)):
                pass

        client = asyncio.ensure_future(drain())
        for event in (None, *events):
            if event is not None:
                event(gateway, gateway.submitted[-1])
            for _ in range(3):
                await asyncio.sleep(0)
        await client
        return gateway.submitted

    return asyncio.run(run())


def test_tokens_that_do_not_come_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = submitted_after(
        monkeypatch,
        lambda g, r: said(g, r, 0, 5),
        lambda g, r: said(g, r, 3, 8),  # the end, of another worker
        lambda g, r: said(g, r, 1, 6, 7, 8),
    )
    assert (first.attempt, again.attempt) == (0, 1)
    assert again.tokens == (*first.tokens, 5)


def test_a_gap_that_closes_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(gateway: Gateway, request: Request) -> None:
        said(gateway, request, 2, 7)
        said(gateway, request, 0, 5, 6)

    (_,) = submitted_after(monkeypatch, late, lambda g, r: said(g, r, 3, 8))


def test_each_gap_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def two(gateway: Gateway, request: Request) -> None:
        said(gateway, request, 1, 6)
        said(gateway, request, 3, 8)
        said(gateway, request, 0, 5)

    first, again = submitted_after(monkeypatch, two, lambda g, r: said(g, r, 2, 7, 8))
    assert again.tokens == (*first.tokens, 5, 6)
