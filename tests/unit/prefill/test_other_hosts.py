"""A prompt whose prefix another host has, which only a master knows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pdserve.ids import BlockKey
from tests.unit.engine.rig import Rig, plain, prompt, request
from tests.unit.prefill.test_prompts import Inbox, run_prefill, seed_store


class FarStore:
    """Another host's, which a master knows."""

    def __init__(self) -> None:
        self.blocks: dict[BlockKey, bytes] = {}
        self.counters: Mapping[str, int] = {}

    def count(self, keys: Sequence[BlockKey]) -> int:
        return sum(key in self.blocks for key in keys)

    def fetch(
        self,
        keys: Sequence[BlockKey],
        first: int,
        end: int,
        take: Callable[[int, memoryview], None],
        *,
        block_bytes: int,
        deadline_s: float,
    ) -> int:
        for index in range(first, end):
            take(index, memoryview(self.blocks[keys[index]]))
        return end - first

    def close(self) -> None: ...


def test_other_hosts_are_asked_for_what_the_router_does_not_know_of() -> None:
    """It hears only of the stores beside prefill workers; a master knows them all."""
    far = FarStore()
    rig, inbox = Rig(remote=far), Inbox()
    rig.decodes["d0"] = inbox  # type: ignore[assignment]
    loop = rig.prefill()
    asked = request(tokens=prompt(14))
    seed_store(rig, asked, count=3)
    far.blocks = {key: bytes(data) for key, data in rig.p_store.blocks.items()}
    rig.p_store.blocks.clear()
    loop.handle(replace(rig.dispatch(asked), cached_tokens=0))
    run_prefill(rig)
    assert rig.runners["p0"].computed_tokens == 2
    assert inbox.handoffs[0].unsent[0].token == plain(asked)[0]
