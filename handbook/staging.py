"""What the site is made of: every page's text, under the name it has there.

Pages that people wrote are taken from ``docs/`` and the root, generated ones from what they
describe. A link that leaves these pages gets a page of its own with the file's text (or a folder's
list of files), so the site is whole without the repository.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from handbook.benchmarks_page import benchmarks_page
from handbook.commands_page import commands_page
from handbook.compatibility_page import compatibility_page
from handbook.grpc_page import grpc_page
from handbook.http_page import http_page
from handbook.links import moved
from handbook.python_page import python_page
from handbook.settings_page import settings_page
from handbook.tables import HEAD, block
from pdserve.errors import ConfigError

ELSEWHERE: Mapping[str, str] = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "examples": "examples.md",
    "bench/results": "benchmarks.md",
    "docs/adr": "adr/index.md",
    "docs/clients.json": "compatibility.md",
    "pdserve/config.py": "reference/settings.md",
    "pdserve/router_config.py": "reference/settings.md",
    "proto/pdserve/v1/inference.proto": "reference/grpc.md",
}
"""Where on the site a file or folder of the repository is, if not where its name says."""

LANGUAGES = {".py": "python", ".yaml": "yaml", ".proto": "protobuf", ".sh": "bash", ".json": "json"}

SOURCE_BYTES_MAX = 200_000


def stage(root: Path, out: Path) -> list[str]:
    """Write every page below ``out``, which is emptied first; their names are returned.

    Raises:
        ConfigError: a link of a page leads nowhere; the message names page and link.
    """
    if out.exists():
        shutil.rmtree(out)
    wanted: dict[str, None] = {}  # of the repository, to be shown as they are

    def place_of(path: PurePosixPath) -> str:
        return place(root, path, wanted)

    pages: dict[str, str] = {}
    for page, to in written(root):
        text = (root / page).read_text()
        try:
            pages[str(to)] = moved(text, page=page, to=to, place_of=place_of)
        except KeyError as error:
            raise ConfigError(f"{page}: a link leads to {error}, which is not there") from error
    pages |= {name: make(root) for name, make in GENERATED.items()}
    for name in list(wanted):
        pages[f"source/{name}.md"] = shown(root, name)
    for name, text in pages.items():
        file = out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for picture in sorted((root / "docs").rglob("*.svg")):
        target = out / picture.relative_to(root / "docs")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, target)
    return sorted(pages)


def written(root: Path) -> Iterator[tuple[PurePosixPath, PurePosixPath]]:
    """Pages that people wrote: where they are, and where they go."""
    for name in ("README.md", "CHANGELOG.md"):
        yield PurePosixPath(name), PurePosixPath(ELSEWHERE[name])
    for file in sorted((root / "docs").rglob("*.md")):
        inside = file.relative_to(root / "docs").as_posix()
        yield PurePosixPath("docs", inside), PurePosixPath(inside)


def place(root: Path, path: PurePosixPath, wanted: dict[str, None]) -> str:
    """Where on the site ``path`` is; notes in ``wanted`` what must be made a page for it.

    Raises:
        KeyError: there is no such file.
    """
    name = str(path)
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    if not (root / path).exists() or name.startswith(".."):
        raise KeyError(name)
    if path.parts[0] == "docs":
        return str(PurePosixPath(*path.parts[1:]))
    wanted[name] = None
    return f"source/{name}.md"


def shown(root: Path, name: str) -> str:
    """A file as it is, or what is in a folder."""
    path = root / name
    if path.is_dir():
        files = sorted(
            file.name for file in path.iterdir() if not file.name.startswith((".", "__"))
        )
        return HEAD + f"# {name}\n\n" + "".join(f"- `{file}`\n" for file in files)
    text = path.read_text()
    assert len(text) <= SOURCE_BYTES_MAX, f"{name} is too long to be a page"
    return HEAD + f"# {name}\n\n" + block(text, LANGUAGES.get(path.suffix, ""))


def examples(folder: Path) -> str:
    out = [HEAD + "# Examples\n\nPrograms of `examples/`, which the tests run.\n"]
    for file in sorted(folder.glob("*.py")):
        out.append(f"## {file.stem}\n\n" + block(file.read_text(), "python"))
    return "\n".join(out)


def decisions(folder: Path) -> str:
    """An index of the records, by number."""
    out = [
        HEAD + "# Decisions\n\nOne page each for what was hard to decide: context, decision, "
        "consequences, what was rejected. A record is never edited, only superseded.\n"
    ]
    for file in sorted(folder.glob("[0-9]*.md")):
        title = file.read_text().splitlines()[0].removeprefix("# ")
        number, _, words = title.partition(". ")
        out.append(f"- {number.zfill(2)} [{words}]({file.name})")
    return "\n".join(out) + "\n"


GENERATED: Mapping[str, Callable[[Path], str]] = {
    "adr/index.md": lambda root: decisions(root / "docs" / "adr"),
    "benchmarks.md": lambda root: benchmarks_page(root / "bench" / "results"),
    "compatibility.md": lambda root: compatibility_page(root / "docs" / "clients.json"),
    "examples.md": lambda root: examples(root / "examples"),
    "reference/commands.md": commands_page,
    "reference/grpc.md": lambda root: grpc_page(root / "proto"),
    "reference/http.md": lambda _: http_page(),
    "reference/python.md": python_page,
    "reference/settings.md": lambda _: settings_page(),
}
"""Pages that are made of what they describe."""
