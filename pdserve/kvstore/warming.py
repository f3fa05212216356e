"""A process that makes the first write to each page of an arena as fast as later ones.

    python -m pdserve.kvstore.warming ARENA

It runs while nobody else wants the core (``SCHED_IDLE``, and rests where that is not enough), and
ends when it is done or when the process that started it has ended. A process, since a thread of
that kind would hold the interpreter lock of a store node for as long as others keep the cores busy.
"""

import os
import sys
import time
from pathlib import Path


def main(path: str) -> None:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    parent = os.getppid()
    from pdserve.kvstore.arena import touch  # numpy; now, or it would compete with the start

    def rest(seconds: float) -> bool:
        time.sleep(seconds)
        return os.getppid() != parent

    touch(Path(path), rest)


if __name__ == "__main__":
    main(*sys.argv[1:])
