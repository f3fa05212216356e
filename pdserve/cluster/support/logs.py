"""The ends of the logs on this host, and what they tell of recent requests."""

import json
import os
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from pdserve.cluster.support.redacting import text_without_secrets, tree_without_secrets

FILES_MAX = 80
TAIL_BYTES = 128 << 10
LINE_CHARACTERS_MAX = 4000
WHY_LINES_MAX = 500
SUFFIXES = frozenset((".log", ".err", ".out", ".txt"))


def log_directories() -> list[Path]:
    """Where Ray writes on this host: of clusters that `pdserve serve` began, and its usual place.

    Temporary directories are everybody's, so only what belongs to this user is looked at.
    """
    temporary = {Path(tempfile.gettempdir()), Path("/tmp")}
    found = [
        *(logs for place in temporary for logs in place.glob("pdserve-*/r/session_latest/logs")),
        *(logs for place in temporary for logs in place.glob("ray/session_latest/logs")),
    ]
    return [logs for logs in sorted(found) if _is_ours(logs)]


def tails(directories: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """(name in the bundle, text) of the latest ``FILES_MAX`` logs, newest first.

    Raises:
        OSError: a directory cannot be read.
    """
    latest = sorted(
        (file for directory in directories for file in _files(directory)),
        key=lambda found: (-found[2], found[0]),
    )
    for name, path, _ in latest[:FILES_MAX]:
        yield name, tail(path)


def tail(path: Path, limit: int = TAIL_BYTES) -> str:
    """The last ``limit`` bytes, from the beginning of a line on."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - limit))
        content = file.read(limit)
    if size > limit:
        content = content.partition(b"\n")[2]
    return content.decode(errors="replace")


def clean(text: str, known: Collection[str] = ()) -> str:
    """As it may leave: without secrets and texts, and no line too long to be read."""
    safe = text_without_secrets(text, known)
    return "".join(
        line if len(line) <= LINE_CHARACTERS_MAX else line[:LINE_CHARACTERS_MAX] + " ... cut\n"
        for line in safe.splitlines(keepends=True)
    )


def why_lines(text: str, known: Collection[str] = ()) -> list[str]:
    """What the logger ``pdserve.why`` wrote, one line of JSON per finished choice; latest last."""
    said = []
    for line in text.splitlines():
        begin = line.find('{"call":')
        if begin < 0:
            continue
        try:
            report = json.loads(line[begin:])
        except ValueError:
            continue
        if isinstance(report, dict) and "decisions" in report:
            said.append(json.dumps(tree_without_secrets(report, known), ensure_ascii=False))
    return said[-WHY_LINES_MAX:]


def _files(directory: Path) -> Iterator[tuple[str, Path, float]]:
    """Regular files alone: a link could lead to anything that this user may read."""
    label = directory.name
    if (
        directory.parent.name == "session_latest"
    ):  # …/pdserve-x/r/session_latest, …/ray/session_latest
        base = directory.parents[1]
        label = base.parent.name if base.name == "r" else base.name
    for folder, _, names in os.walk(directory, followlinks=False):
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix not in SUFFIXES:
                continue
            try:
                about = path.lstat()
            except FileNotFoundError:
                continue  # rotated away meanwhile
            if stat.S_ISREG(about.st_mode) and about.st_size:
                inside = path.relative_to(directory)
                yield str(Path("logs", label, inside)), path, about.st_mtime


def _is_ours(path: Path) -> bool:
    real = path.resolve()
    return real.is_dir() and real.stat().st_uid == os.getuid()
