"""A store node for campaigns: the product's own, but that its disk's segments are small, and that a
guard may have been taken away from it.

    python -m tests.campaign.node [--mutant NAME] [--stop-before-register] ARGUMENTS OF THE NODE

With ``--stop-before-register`` it stops itself (SIGSTOP) when it has its epoch and is not entered
yet: a node that was away for a while, as seen by its successor.
"""

import sys
from functools import partial
from typing import Any

from pdserve.kvstore import node
from pdserve.kvstore.masters.metadata import EmbeddedMetadata, Member, RedisMetadata
from pdserve.kvstore.ssd.log import open_log
from tests.campaign.stopping import stop_here

SEGMENT_BYTES = 4 << 20
"""So that segments are filled, and go, within seconds."""

SSD_BYTES = 4 * SEGMENT_BYTES


def _stop_before_register(cls: Any) -> None:
    register = cls.register

    def stop_and_register(self: Any, member: Member) -> None:
        stop_here()
        register(self, member)

    cls.register = stop_and_register


def main(arguments: list[str]) -> int:
    arguments = list(arguments)
    if arguments[:1] == ["--mutant"]:
        from tests.campaign.mutants import MUTANTS

        MUTANTS[arguments[1]].change_node()
        del arguments[:2]
    if arguments[:1] == ["--stop-before-register"]:
        for cls in (EmbeddedMetadata, RedisMetadata):
            _stop_before_register(cls)
        del arguments[:1]
    node.open_log = partial(open_log, segment_bytes=SEGMENT_BYTES)  # type: ignore[attr-defined]
    return node.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
