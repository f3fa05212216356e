"""Ray for one cluster on this machine, which gets more than one chance to start.

Ray allows a new node 30 s to report itself, and no setting changes that. It is enough on a machine
that has time; where all cores are taken it is not, and the next attempt finds its files in memory.
"""

import contextlib
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pdserve.errors import ConfigError

STARTS_MAX = 3
TOO_SLOW = "timed out during startup"
"""Of an exception that has no type of its own."""


def start_ray(
    directory: Path,
    object_store_bytes: int,
    *,
    progress: Callable[[str], None],
    init: Callable[..., Any] | None = None,
) -> None:
    """Starts a node with its files below ``directory``, which nobody else uses, and connects to it.

    Args:
        init: ``ray.init`` unless a test has another.

    Raises:
        ConfigError: it was too slow ``STARTS_MAX`` times.
    """
    if init is None:
        import ray

        init = ray.init
    for attempt in range(STARTS_MAX):
        files = directory / f"r{attempt or ''}"
        try:
            init(
                include_dashboard=False,
                object_store_memory=object_store_bytes,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                _temp_dir=str(files),
                _node_ip_address="127.0.0.1",
            )
        except Exception as error:
            if TOO_SLOW not in str(error):
                raise
            kill_all_that_name(files)
            if attempt + 1 == STARTS_MAX:
                raise ConfigError(
                    f"Ray did not start, {STARTS_MAX} times in 30 s each: this machine has no time "
                    "for it. Look at what else runs here, then start again"
                ) from error
            progress("Ray was too slow, starting it once more")
        else:
            return


def kill_all_that_name(files: Path) -> None:
    """What a failed start leaves: Ray ends it only when this process ends. Each of Ray's processes
    has its directory in its command line."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it has just ended, or is another user's
                if f"{files}/" in (entry / "cmdline").read_text():
                    os.kill(int(entry.name), signal.SIGKILL)
