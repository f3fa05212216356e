"""Room for beam searches: each beam begins a block of its own at the decode worker."""

from dataclasses import replace

from pdserve.messages import Beams
from tests.unit.router import build

PROMPT_TOKENS = 3 * build.BLOCK_TOKENS


def submitted(*, width: int | None, block_count: int) -> tuple[list[str], int]:
    """What is said of a request, and the blocks that are reserved for it then."""
    core, _ = build.core_with(build.hello("p0"), build.hello("d0", block_count=block_count))
    asked = build.request("r", PROMPT_TOKENS)
    if width is not None:
        asked = replace(asked, beams=Beams(width, 1))
    said = build.told(core.on_submit(asked, build.NOW))
    core.state.check()
    entry = core.state.entries.get(asked.request)
    return said, entry.reserved_blocks if entry else 0


def test_its_beams_blocks_are_reserved_with_its_prompt_s() -> None:
    assert submitted(width=None, block_count=100)[1] == 4
    assert submitted(width=5, block_count=100)[1] == 4 + 5


def test_one_that_fits_nowhere_is_refused_at_once() -> None:
    said, reserved = submitted(width=16, block_count=12)
    assert reserved == 0
    assert len(said) == 1
    assert "refused r/0: 20 blocks wanted, 12 free" in said[0]
    assert submitted(width=None, block_count=12)[1] == 4
