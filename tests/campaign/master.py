"""A master for campaigns: the product's own, but that a guard may have been taken away from it.

    python -m tests.campaign.master [--mutant NAME] [--stop-before-renewal] ARGUMENTS OF THE MASTER

With ``--stop-before-renewal`` it stops itself (SIGSTOP) once, when it leads and is about to say so
again: a leader that was away for a while, as seen by its successor.
"""

import sys
from typing import Any

from pdserve.kvstore.masters import process as master_process
from pdserve.kvstore.masters.metadata import EmbeddedMetadata, RedisMetadata, Seat
from tests.campaign.stopping import stop_here


def _stop_before_renewal(cls: Any) -> None:
    change_seat = cls.change_seat
    is_first = True

    def stop_and_change(self: Any, seen: Seat | None, after: Seat) -> bool:
        nonlocal is_first
        if is_first and seen is not None and seen.epoch == after.epoch:
            is_first = False
            stop_here()
        return bool(change_seat(self, seen, after))

    cls.change_seat = stop_and_change


def main(arguments: list[str]) -> int:
    arguments = list(arguments)
    if arguments[:1] == ["--mutant"]:
        from tests.campaign.mutants import MUTANTS

        MUTANTS[arguments[1]].change_master()
        del arguments[:2]
    if arguments[:1] == ["--stop-before-renewal"]:
        for cls in (EmbeddedMetadata, RedisMetadata):
            _stop_before_renewal(cls)
        del arguments[:1]
    return master_process.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
