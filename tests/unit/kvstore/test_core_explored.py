"""All interleavings of small programs, and that the explorer would see a missing guard."""

import pytest

from pdserve.kvstore.core import StoreCore
from tests.campaign.cores import (
    ForgetsPins,
    IgnoresBoards,
    KeepsForTheDead,
    LooksTooLate,
    PublishesEarly,
    ReusesAborted,
    StoresOrphans,
)
from tests.campaign.explorer import explore
from tests.campaign.scenes import SCENES, Scene

PUTS, FULL, CHILDREN, ABORTED, *_, BY_ITSELF = SCENES


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_every_interleaving_keeps_every_promise(scene: Scene) -> None:
    assert explore(scene).states > 100, "as many as that, or a program has become too short"


@pytest.mark.parametrize(
    ("core_type", "scene"),
    [
        (PublishesEarly, PUTS),
        (KeepsForTheDead, PUTS),
        (ForgetsPins, FULL),
        (StoresOrphans, CHILDREN),
        (ReusesAborted, ABORTED),
        (IgnoresBoards, BY_ITSELF),
    ],
    ids=lambda value: value.name if isinstance(value, Scene) else value.__name__,
)
def test_a_core_without_a_guard_is_found_out(core_type: type[StoreCore], scene: Scene) -> None:
    with pytest.raises(AssertionError, match="after: "):
        explore(scene, core_type)


def test_a_reader_that_is_seen_late_keeps_its_block_too() -> None:
    """It pins between a node's look at its board and the eviction: the slot drains."""
    assert explore(BY_ITSELF, LooksTooLate).states > 100
