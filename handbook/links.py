"""Links between pages: where they lead, and how they must read elsewhere. Pure.

Pages link to each other and to files of the repository by relative paths, as a reader of the
repository needs them. On the site some things lie elsewhere; ``moved`` writes their links anew.
"""

import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

FENCE = re.compile(r"^\s*(```+|~~~+)")
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)(\))")
HEADING = re.compile(r"^#{1,6} +(.*?)\s*#*$")
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
ELSEWHERE = re.compile(r"^[a-z][a-z0-9+.-]*:", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Link:
    line: int  # from 1
    target: str  # as it stands there

    @property
    def leaves(self) -> bool:
        """It leads to another site."""
        return bool(ELSEWHERE.match(self.target))

    def path_from(self, page: PurePosixPath) -> PurePosixPath:
        """The file it leads to, from the root of the repository; ``page`` itself for ``#part``."""
        path = self.target.partition("#")[0]
        if not path:
            return page
        return PurePosixPath(posixpath.normpath(str(page.parent / path)))

    @property
    def part(self) -> str:
        return self.target.partition("#")[2]


def links_of(text: str) -> Iterator[Link]:
    """Links in prose; what stands in fences or in `code` is none."""
    for number, line in _prose(text):
        for found in LINK.finditer(_without_code(line)):
            yield Link(number, found[2])


def anchors_of(text: str) -> set[str]:
    """What may stand behind the # of a link to this page: its headings, as Python-Markdown's and
    GitHub's rules agree on them for plain words."""
    anchors: set[str] = set()
    for _, line in _prose(text):
        if heading := HEADING.match(line):
            slug = slug_of(heading[1])
            later = (f"{slug}_{index}" for index in range(1, 1000))
            anchors.add(slug if slug not in anchors else next(s for s in later if s not in anchors))
    return anchors


def slug_of(heading: str) -> str:
    words = re.sub(r"[^\w\s-]", "", heading).strip().lower()
    return re.sub(r"[-\s]+", "-", words)


def moved(
    text: str, *, page: PurePosixPath, to: PurePosixPath, place_of: Callable[[PurePosixPath], str]
) -> str:
    """``text`` of ``page``, with its links as they must read at ``to``.

    Args:
        place_of: where on the site a file of the repository is; raises KeyError for none.
    """

    lines = text.split("\n")
    for number, line in _prose(text):
        for found in reversed(list(LINK.finditer(_without_code(line)))):
            begin, end = found.span(2)
            target = _moved(Link(number, line[begin:end]), page, to, place_of)
            lines[number - 1] = lines[number - 1][:begin] + target + lines[number - 1][end:]
    return "\n".join(lines)


def _moved(
    link: Link, page: PurePosixPath, to: PurePosixPath, place_of: Callable[[PurePosixPath], str]
) -> str:
    if link.leaves or not link.target.partition("#")[0]:
        return link.target
    path = posixpath.relpath(place_of(link.path_from(page)), to.parent)
    return path + (f"#{link.part}" if link.part else "")


def _prose(text: str) -> Iterator[tuple[int, str]]:
    """Lines outside fences, with their numbers from 1."""
    fence = ""
    for number, line in enumerate(text.split("\n"), start=1):
        mark = FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        elif mark:
            fence = mark[1]
        else:
            yield number, line


def _without_code(line: str) -> str:
    """As long as before, so that what is found in it can be found in the line."""
    return CODE.sub(lambda found: "\0" * len(found[0]), line)
