"""What the pages say exists: links, anchors, commands, settings, targets."""

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pytest
import typer.main
import yaml

from handbook.links import anchors_of, links_of
from handbook.staging import GENERATED, written
from pdserve.cluster.cli import app
from pdserve.settings_schema import settings_schema
from tests.architecture.imports import ROOT

PAGES = [str(page) for page, _ in written(ROOT)]
TODAY = [page for page in PAGES if not page.startswith(("docs/adr/", "CHANGELOG"))]
"""Not what speaks of its own day: decisions and changes."""

FENCES = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
SETTING = re.compile(
    r"`(?:--set )?((?:model|prefill|decode|store|router|gateway|autoscaling)"
    r"\.[a-z][a-z_]*[a-z])(?=[`=: ])"
)
COMMAND = re.compile(r"`(pdserve [^`]*)`")


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    lost = [
        f"{page}:{link.line}: {link.target}"
        for link in links_of(text_of(page))
        if not link.leaves and not _leads(page, link.path_from(PurePosixPath(page)), link.part)
    ]
    assert lost == []


def _leads(page: str, path: PurePosixPath, part: str) -> bool:
    file = ROOT / path
    if not file.exists() or str(path).startswith(".."):
        return False
    return not part or (path.suffix == ".md" and part in anchors_of(file.read_text()))


@pytest.mark.parametrize("page", TODAY)
def test_every_command_is_one_that_our_command_line_takes(page: str) -> None:
    refused = [f"{line}: {why}" for line in commands_in(text_of(page)) if (why := refusal(line))]
    assert refused == []


def commands_in(text: str) -> Iterator[str]:
    """Of fences of sh, and of `code`."""
    for language, code in FENCES.findall(text):
        for line in code.replace("\\\n", " ").splitlines() if language == "sh" else ():
            if line.startswith("pdserve "):
                yield line
    yield from COMMAND.findall(FENCES.sub("", text))


def refusal(line: str) -> str:
    """Why the command line would not take it; nothing where it would. Nothing is run."""
    words = shlex.split(re.sub(r"\s+#.*|\[.*?\]|…|\.\.\.", "", line).replace(" | ", " "))[1:]
    command = _command_line()
    name = "pdserve"
    while words and hasattr(command, "commands"):
        name = words.pop(0)
        if name not in command.commands:
            return f"there is no {name}"
        command = command.commands[name]
    if not words:
        return ""  # the name of a command, in prose
    try:
        command.make_context(name, words)
    except Exception as error:
        said = str(getattr(error, "message", error)) or type(error).__name__
        return "" if said.startswith("Missing") or isinstance(error, typer.Exit) else said
    return ""


@pytest.mark.parametrize("page", TODAY)
def test_every_setting_that_a_page_names_can_be_set(page: str) -> None:
    known = _settings()
    unknown = {
        name
        for name in SETTING.findall(text_of(page))
        if name.split(".")[1] not in known[name.split(".")[0]]["properties"]
    }
    assert unknown - NO_SETTINGS == set()


@functools.cache
def _settings() -> dict[str, Any]:
    return dict(settings_schema()["properties"])


@functools.cache
def _command_line() -> Any:
    return typer.main.get_command(app)


NO_SETTINGS = {"autoscaling.json"}
"""A file's name."""


def test_the_sites_contents_name_every_page_and_no_other() -> None:
    tree = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = sorted(_names(tree["nav"]))
    pages = [str(to) for _, to in written(ROOT) if to.parts[0] != "adr"] + list(GENERATED)
    assert listed == sorted(pages)


def _names(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    for branch in (
        tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    ):
        yield from _names(branch)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("pdserve nosuch", "there is no nosuch"),
        ("pdserve kv nosuch FILE", "there is no nosuch"),
        ("pdserve status --nosuch 3", "No such option"),
        ("pdserve simulate TRACE --seed much", "valid integer"),
    ],
)
def test_a_planted_command_is_found(line: str, problem: str) -> None:
    assert problem in refusal(line)


@pytest.mark.parametrize(
    "line",
    [
        "pdserve status --json",
        "pdserve kv warm FILE [--pin 30m]",
        "pdserve serve MODEL --set store.arena_bytes=5",
        "pdserve config",
    ],
)
def test_a_command_that_exists_is_none(line: str) -> None:
    assert refusal(line) == ""


def test_a_planted_link_is_found() -> None:
    assert not _leads("docs/x.md", PurePosixPath("docs/nosuch.md"), "")
    assert not _leads("docs/x.md", PurePosixPath("docs/security.md"), "nosuch")
    assert _leads("docs/x.md", PurePosixPath("docs/security.md"), "tls")
