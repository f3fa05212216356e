import posixpath
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handbook.links import anchors_of, links_of, moved

NAMES = st.text("abc", min_size=1, max_size=3)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(lambda parts: PurePosixPath(*parts))


@given(page=PATHS, target=PATHS, to=PATHS, place=PATHS)
def test_a_moved_link_leads_to_where_its_file_is_now(
    page: PurePosixPath, target: PurePosixPath, to: PurePosixPath, place: PurePosixPath
) -> None:
    written = posixpath.relpath(target, page.parent)

    def place_of(path: PurePosixPath) -> str:
        assert path == target
        return str(place)

    text = moved(f"see [it]({written}#part).", page=page, to=to, place_of=place_of)
    (link,) = links_of(text)
    assert link.path_from(to) == place
    assert link.part == "part"


@pytest.mark.parametrize(
    "text",
    [
        "`[x](nosuch.md)`",
        "```\n[x](nosuch.md)\n```",
        "~~~~ sh\n~~~\n[x](nosuch.md)\n~~~~",
        "[x](https://example.org/nosuch.md)",
        "[x](#part)",
    ],
)
def test_what_leads_to_no_file_stays(text: str) -> None:
    def nowhere(path: PurePosixPath) -> str:
        raise KeyError(path)

    page = PurePosixPath("docs/a.md")
    assert moved(text, page=page, to=PurePosixPath("a.md"), place_of=nowhere) == text


def test_links_are_found_between_code_and_with_code_in_their_words() -> None:
    text = "`a/*` of the [console](x.md) and `b`; [`c`](y.md#z), ![p](q.svg)"
    assert [(link.target, link.part) for link in links_of(text)] == [
        ("x.md", ""),
        ("y.md#z", "z"),
        ("q.svg", ""),
    ]


def test_a_file_that_is_not_there_is_told() -> None:
    def nowhere(path: PurePosixPath) -> str:
        raise KeyError(str(path))

    page = PurePosixPath("docs/a.md")
    with pytest.raises(KeyError, match="docs/nosuch"):
        moved("[x](nosuch.md)", page=page, to=page, place_of=nowhere)


def test_headings_are_anchors() -> None:
    text = "# What *may* go, and what\n## What may go\n## What may go\n```\n# no heading\n```"
    assert anchors_of(text) == {"what-may-go-and-what", "what-may-go", "what-may-go_1"}
