"""No file of the repository has a secret in it: nothing that looks like a key, whoever's it is.

The forms are those that ``pdserve support-bundle`` takes out of logs. A test that needs something
of such a form makes it while it runs.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.cluster.support.redacting import forms_in
from tests.architecture.imports import ROOT

BYTES_MAX = 4 << 20
"""Traces and recordings of benchmarks are longer, and hold numbers."""

IGNORED = {
    ".git",
    ".venv",
    ".venv-clients",
    ".models",
    ".cache",
    "build",
    "__pycache__",
}


def files() -> Iterator[Path]:
    """What is or would be committed; where there is no git, whatever is there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        names = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        names = [p for p in ROOT.rglob("*") if not IGNORED & set(p.relative_to(ROOT).parts)]
    yield from (path for path in names if path.is_file() and not path.is_symlink())


def found_in(text: str) -> list[str]:
    """The beginnings of what looks like a key: a report must not repeat it."""
    return [form[:12] for form in forms_in(text)]


def test_no_file_holds_a_secret() -> None:
    found = {
        str(path.relative_to(ROOT)): said
        for path in files()
        if path.stat().st_size <= BYTES_MAX
        and (said := found_in(path.read_bytes().decode(errors="replace")))
    }
    assert found == {}


@pytest.mark.parametrize(
    "secret",
    [
        "pd-" + "0a" * 32,
        "sk-" + "aB3" * 10,
        "hf_" + "aB3" * 10,
        "AKIA" + "ABCD" * 4,
        "-----BEGIN " + "PRIVATE KEY-----\nabc",
    ],
)
def test_a_planted_secret_is_found(secret: str) -> None:
    assert found_in(f"x = {secret!s}\n")
