"""Pins that requests ask for: every store is told, until one has the whole prompt."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pytest

from pdserve.cluster.gateway import pinning
from pdserve.cluster.gateway.pinning import AT_ONCE, Pinning
from pdserve.errors import StoreUnavailable
from pdserve.ids import BlockKey, HostId
from pdserve.messages import Address

KEYS = [BlockKey(bytes([n]) * 16) for n in range(3)]
HOUR_MS = 3_600_000


class Stores:
    """How many blocks each has at its next looks; the last figure stays. None: it is away."""

    def __init__(self, **counts: list[int | None]) -> None:
        self.counts = counts
        self.looks: list[str] = []

    async def snapshot(self) -> Mapping[str, Any]:
        addresses = {name: Address(HostId("host"), f"/{name}.sock", "") for name in self.counts}
        return {
            "workers": [
                {"store_id": name, "store": asdict(address), "worker": name}
                for name, address in addresses.items()
            ]
        }

    def pin(self, address: Address, keys: Sequence[BlockKey], lifetime_ms: int, _: object) -> int:
        assert (list(keys), lifetime_ms) == (KEYS, HOUR_MS)
        name = address.unix_path[1:-5]
        self.looks.append(name)
        counts = self.counts[name]
        count = counts.pop(0) if len(counts) > 1 else counts[0]
        if count is None:
            raise StoreUnavailable(f"{name} is away")
        return count


def looks_of(stores: Stores, monkeypatch: pytest.MonkeyPatch, *, prompts: int = 1) -> list[str]:
    """Who was looked at, in order, until nobody was any more."""
    monkeypatch.setattr(pinning, "_pin", stores.pin)
    monkeypatch.setattr(pinning, "PAUSES_S", (0.0,) * 4)

    async def run() -> None:
        keeper = Pinning(stores.snapshot)
        running = asyncio.create_task(keeper.run())
        for _ in range(prompts):
            keeper.keep(KEYS, HOUR_MS)
        await keeper._waiting.join()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(run())
    return stores.looks


def test_a_prompt_that_is_there_is_pinned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(looks_of(Stores(a=[0], b=[3]), monkeypatch)) == ["a", "b"]


def test_blocks_on_their_way_are_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks_of(Stores(a=[0, 1, 3]), monkeypatch) == ["a"] * 3


def test_blocks_that_never_come_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks_of(Stores(a=[0]), monkeypatch) == ["a"] * 5


def test_a_store_that_is_away_does_not_keep_others_from_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks = looks_of(Stores(a=[None], b=[0, 3]), monkeypatch)
    assert looks.count("b") == 2
    assert "a is away" in caplog.text


def test_more_prompts_than_are_looked_for_at_once_have_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = 2 * AT_ONCE + 1
    assert len(looks_of(Stores(a=[3]), monkeypatch, prompts=prompts)) == prompts
