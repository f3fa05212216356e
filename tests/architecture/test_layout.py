"""The house from outside: links, docstrings, sizes, and no promise without an issue."""

import ast
import re
from pathlib import Path

import pytest

from tests.architecture.imports import PACKAGE, ROOT, source_files

LINES_MAX = 500
OURS = [PACKAGE, ROOT / "tests", ROOT / "bench", ROOT / "handbook"]
FOLDERS = sorted(
    path.parent for path in PACKAGE.glob("*/__init__.py") if path.parent.name != "proto"
)


@pytest.mark.parametrize("name", ["cluster", "decode", "kvstore", "prefill", "router"])
def test_the_links_at_the_root_show_the_rooms(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert link.readlink() == Path("pdserve") / name
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.name))
def test_a_folder_says_what_it_is_for_and_nothing_else(folder: Path) -> None:
    tree = ast.parse((folder / "__init__.py").read_text())
    assert len((ast.get_docstring(tree) or "").splitlines()) >= 3
    assert len(tree.body) == 1


@pytest.mark.parametrize("suffix", [".py", ".cpp"])
def test_no_file_is_longer_than_one_can_keep_in_mind(suffix: str) -> None:
    files = source_files(*OURS) if suffix == ".py" else sorted(PACKAGE.rglob(f"*{suffix}"))
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    too_long = {name: count for name, count in lengths.items() if count > LINES_MAX}
    assert too_long == {}


def test_every_file_begins_with_its_theory() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in source_files(PACKAGE, ROOT / "bench")
        if ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert silent == []


def promises_without_issue(text: str) -> list[str]:
    """Lines that put something off without naming the issue that will do it."""
    word = "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK"))
    return [
        line
        for line in text.splitlines()
        if re.search(rf"\b({word})\b", line) and not re.search(rf"\b({word})\(#\d+\)", line)
    ]


def test_nothing_is_put_off_without_an_issue() -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in source_files(*OURS)
        if (lines := promises_without_issue(path.read_text()))
    }
    assert found == {}


def test_a_planted_promise_is_found() -> None:
    word = "TO" + "DO"
    assert promises_without_issue(f"x = 1  # {word}: later\ny = 2") == [f"x = 1  # {word}: later"]
    assert promises_without_issue(f"# {word}(#12): later") == []
