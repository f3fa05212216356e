"""The command line's reference, as its own library writes it down."""

import os
import subprocess
import sys
from pathlib import Path

from handbook.tables import HEAD
from pdserve.errors import PdserveError

WAIT_S_MAX = 120


def commands_page(root: Path) -> str:
    """
    Raises:
        PdserveError: the command line cannot be read; the message has what it said.
    """
    ran = subprocess.run(
        [sys.executable, "-m", "typer", "pdserve.cluster.cli", "utils", "docs", "--name", "pdserve",
         "--title", "Command line"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *_paths()])},
        capture_output=True,
        text=True,
        timeout=WAIT_S_MAX,
        check=False,
    )  # fmt: skip
    if ran.returncode != 0:
        raise PdserveError(f"the command line's reference cannot be made: {ran.stderr[-2000:]}")
    return HEAD + ran.stdout.replace("<", "&lt;")


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
