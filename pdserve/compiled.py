"""The router and the simulator as machine code: the same sources, translated by mypyc.

``pdserve compile`` builds them, once per machine; here is how every process finds what was built.
A build is whole copies of the two folders with the compiled modules beside their sources, and goes
before the installed package on its path. Its folder's name is a digest of all that went in, so new
sources never meet an old build: where there is none for them, Python interprets, with the same
decisions, in about twice the time. ``PDSERVE_COMPILED=0`` does so always.
"""

import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterator, MutableSequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
FOLDERS = ("router", "simulator")


def cache_directory() -> Path:
    """Of what is built once per machine: ``$PDSERVE_CACHE``, or a folder in the user's cache."""
    root = os.environ.get("PDSERVE_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "pdserve"


def prefer_compiled(path: MutableSequence[str]) -> None:
    """Put the build of these sources, if there is one, first on the package's path."""
    if os.environ.get("PDSERVE_COMPILED", "1") == "0" or not _builds().is_dir():
        return
    package = build_directory() / "pdserve"
    if package.is_dir():
        path.insert(0, str(package))


def is_in_use() -> bool:
    """Whether this process runs the compiled modules."""
    import pdserve

    return pdserve.__path__[0] != str(PACKAGE)


@functools.cache
def build_directory() -> Path:
    """Where the build of these sources is, or would be."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(str(sysconfig.get_config_var("EXT_SUFFIX")).encode())  # interpreter and platform
    for file in _sources():
        digest.update(b"\0" + file.name.encode() + b"\0" + file.read_bytes())
    return _builds() / digest.hexdigest()


def _builds() -> Path:
    return cache_directory() / "compiled"


def _sources() -> Iterator[Path]:
    """The folders, and the vocabulary whose types went in."""
    for folder in (PACKAGE, *(PACKAGE / name for name in FOLDERS)):
        files = folder.glob("*.py") if folder == PACKAGE else folder.rglob("*.py")
        yield from sorted(files)
