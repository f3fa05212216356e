"""The archive: what came of every source, within a bound, and a manifest of what did not. Pure, but
for ``write``."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pdserve.errors import ConfigError

MiB = 1 << 20

PART_BYTES_MAX = 8 * MiB
TOTAL_BYTES_MAX = 32 * MiB
"""Before compression, so that unpacking has a bound too."""

CUT = b"\n... cut here by pdserve support-bundle\n"


@dataclass(frozen=True, slots=True)
class Gathered:
    """What came of one source: ``content``, or the reason why nothing did."""

    name: str
    content: bytes = b""
    missing: str = ""
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the manifest."""

    name: str
    bytes: int
    took_s: float
    cut: bool = False
    missing: str = ""


def within_bounds(
    gathered: Sequence[Gathered],
    *,
    part_bytes_max: int = PART_BYTES_MAX,
    total_bytes_max: int = TOTAL_BYTES_MAX,
) -> tuple[list[Gathered], list[Entry]]:
    """What goes in, in the order of ``gathered``, so the first are the last to be cut."""
    kept: list[Gathered] = []
    entries: list[Entry] = []
    left = total_bytes_max
    for part in gathered:
        if part.missing:
            entries.append(Entry(part.name, 0, part.took_s, missing=part.missing))
            continue
        limit = min(part_bytes_max, left)
        cut = len(part.content) > limit
        content = part.content
        if cut:
            if limit <= len(CUT):
                entries.append(Entry(part.name, 0, part.took_s, missing="the bundle is full"))
                continue
            content = content[: limit - len(CUT)] + CUT
        left -= len(content)
        kept.append(Gathered(part.name, content))
        entries.append(Entry(part.name, len(content), part.took_s, cut=cut))
    return kept, entries


def packed(gathered: Sequence[Gathered], about: dict[str, Any], *, at_unix_s: int) -> bytes:
    """A ``tar.gz`` with everything in one folder, ``manifest.json`` first."""
    kept, entries = within_bounds(gathered)
    manifest = {
        **about,
        "parts": [asdict(entry) for entry in entries if not entry.missing],
        "missing": {entry.name: entry.missing for entry in entries if entry.missing},
    }
    first = Gathered("manifest.json", json.dumps(manifest, indent=1).encode() + b"\n")
    out = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=out, mode="wb", mtime=at_unix_s) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as tar,
    ):
        for part in (first, *kept):
            member = tarfile.TarInfo(f"pdserve-bundle/{part.name}")
            member.size, member.mtime, member.mode = len(part.content), at_unix_s, 0o600
            tar.addfile(member, io.BytesIO(part.content))
    return out.getvalue()


def write(path: Path, content: bytes) -> None:
    """A new file that its owner alone can read.

    Raises:
        ConfigError: there is a file already, or none can be made.
    """
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"--out is {path}: {error.strerror}; name another file") from error
    with os.fdopen(file, "wb") as out:
        out.write(content)
