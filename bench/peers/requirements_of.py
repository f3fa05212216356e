"""What a wheel requires on x86-64 Linux, extras left out: one requirement a line.

    requirements_of.py WHEEL [NAME ...]        without those for NAME

For a wheel that must be installed without its own pins of some packages.
"""

import re
import sys
import zipfile
from collections.abc import Collection, Iterator


def requirements(metadata: str, *, without: Collection[str]) -> Iterator[str]:
    """The unconditional requirements in a wheel's METADATA."""
    for line in metadata.splitlines():
        header, _, value = line.partition(":")
        requirement = value.strip()
        if header != "Requires-Dist" or "extra ==" in requirement:
            continue
        if 'platform_machine == "' in requirement and "x86_64" not in requirement:
            continue
        name = re.match(r"[\w.-]+", requirement)
        if name is not None and name.group() not in without:
            yield requirement


def main() -> None:
    path, *without = sys.argv[1:]
    with zipfile.ZipFile(path) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = wheel.read(name).decode()
    print("\n".join(requirements(metadata, without=without)))


if __name__ == "__main__":
    main()
