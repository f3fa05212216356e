"""What a worker says of its host's store: everything once, then what changes, in pieces."""

import asyncio
from collections import Counter
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pdserve.cluster import store_watch
from pdserve.cluster.store_watch import KEYS_AT_ONCE, News, StoreWatch
from pdserve.errors import StoreUnavailable
from pdserve.ids import BlockKey
from pdserve.kvstore.answers import StoreChanges
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.feed import ChangeFeed


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(16, "big"))


class Store:
    """A node's feed and what it has; steps are taken one by one as it is asked for changes."""

    def __init__(self, *steps: list[tuple[int, bool]], changes_max: int = 1 << 20) -> None:
        self.steps = list(steps)
        self.feed = ChangeFeed(changes_max=changes_max)
        self.stored: dict[BlockKey, None] = {}
        self.figures: Counter[str] = Counter()

    def step(self) -> None:
        for number, comes in self.steps.pop(0):
            if comes:
                self.stored[key(number)] = None
            else:
                del self.stored[key(number)]
            self.feed.note(key(number), comes)

    def changes(self, after: int) -> StoreChanges:
        if not self.steps:
            raise StoreUnavailable("it has ended")
        self.step()
        found = self.feed.since(after)
        if found is None:
            return StoreChanges(self.feed.sequence, tuple(self.stored), (), complete=False)
        added, removed = found
        return StoreChanges(self.feed.sequence, tuple(added), tuple(removed), complete=True)

    def stat(self) -> Any:
        return SimpleNamespace(tickets_own=0, counters=lambda: dict(self.figures))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_watch, "ASK_S", 0.0)


def told(store: Store, *, forgets_after: int | None = None) -> list[News]:
    """All that is said until the store ends. ``forgets_after`` so many pieces the listener has
    forgotten all."""
    watch = StoreWatch(cast(StoreClient, store))

    async def listen() -> list[News]:
        heard: list[News] = []
        async with aclosing(watch.news()) as news:
            async for each in news:
                heard.append(each)
                if len(heard) == forgets_after:
                    watch.tell_anew()
        return heard

    heard = asyncio.run(listen())
    assert watch.lost == "it has ended"
    return heard


def known(heard: list[News]) -> set[BlockKey]:
    """What somebody believes who hears this."""
    keys: set[BlockKey] = set()
    for news in heard:
        keys = set() if news.anew else keys
        keys = (keys - set(news.removed)) | set(news.added)
    return keys


def test_it_tells_what_is_there_and_then_what_changes() -> None:
    heard = told(Store([(1, True), (2, True)], [(1, False), (3, True)], []))
    assert known(heard[:1]) == {key(1), key(2)}
    assert known(heard) == {key(2), key(3)}
    assert not any(news.anew for news in heard)


def test_counters_alone_are_news_too() -> None:
    store = Store([], [])
    store.figures["claims"] = 3
    assert told(store) == [News()]


def test_who_tells_nobody_of_blocks_does_not_ask_for_them() -> None:
    store = Store([(1, True)])
    store.figures["claims"] = 3
    watch = StoreWatch(cast(StoreClient, store), with_blocks=False)

    async def listen() -> News:
        async with aclosing(watch.news()) as news:
            return await anext(news)

    assert asyncio.run(listen()) == News()
    assert watch.counters == {"claims": 3}
    assert store.steps, "a whole store was put together for nobody"


def test_a_whole_store_is_told_in_pieces_and_nothing_meanwhile_is_missed() -> None:
    many = [(number, True) for number in range(3 * KEYS_AT_ONCE + 1)]
    store = Store(many, [(0, False)], [])
    heard = told(store)
    assert [len(news.added) for news in heard] == [*[KEYS_AT_ONCE] * 3, 1, 0]
    assert known(heard) == set(store.stored)


def test_where_changes_are_forgotten_what_was_told_is_void() -> None:
    store = Store([(1, True)], [(1, False), (2, True), (3, True)], [], changes_max=2)
    heard = told(store)
    assert [news.anew for news in heard] == [False, True, False]
    assert known(heard) == {key(2), key(3)}


@pytest.mark.parametrize("forgets_after", [1, 2, 3])
def test_who_has_forgotten_all_hears_all_again(forgets_after: int) -> None:
    many = [(number, True) for number in range(2 * KEYS_AT_ONCE)]
    store = Store(many, [(0, False)], [], [])
    heard = told(store, forgets_after=forgets_after)
    assert known(heard[forgets_after:]) == set(store.stored)
