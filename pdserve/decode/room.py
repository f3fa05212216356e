"""Who yields when a decode worker runs out of blocks. Pure.

A running sequence needs one more block every ``block_tokens`` steps, and none was set aside for
it: lengths are not known, and blocks kept for what may never come would serve nobody. When blocks
run out, those that came last leave for the store, where any worker can take them up again.
The oldest never yields, so somebody always gets on and the pool always empties in the end.
"""

from collections.abc import Sequence


def victims(shortfall_blocks: int, private_blocks: Sequence[int]) -> int:
    """How many of the latest must leave to free ``shortfall_blocks``.

    Args:
        private_blocks: of each running sequence, oldest first: the blocks nobody else holds, which
            is what its leaving frees.

    Returns:
        A count; at most all but the oldest, even where that does not suffice.
    """
    count, freed = 0, 0
    while freed < shortfall_blocks and count < len(private_blocks) - 1:
        count += 1
        freed += private_blocks[-count]
    return count
