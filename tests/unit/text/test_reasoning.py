"""The parser of thoughts: what it finds, and that no cut of the stream changes it."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.config import ReasoningStyle
from pdserve.text.reasoning import CLOSE, FIRST, OPEN, TAGS, Parts, Place, ReasoningParser

STYLES = st.sampled_from(get_args(ReasoningStyle))
# Whole tags, beginnings of tags and what is neither, so that tags meet every border.
TEXTS = st.lists(
    st.sampled_from([OPEN, CLOSE, "<", "</", "<think", "</think", ">", "think>", "a", "é", "\n"])
).map("".join)


def naive(text: str, style: ReasoningStyle) -> Parts:
    """The whole text at once, by partition."""
    before, opened, after = text.partition(OPEN)
    if style == "qwen3":
        if not opened:
            return Parts("", text)
        reasoning, _, content = after.partition(CLOSE)
        return Parts(reasoning, before + content)
    reasoning, _, content = text.partition(CLOSE)
    return Parts(reasoning.replace(OPEN, "", 1), content)


def whole(text: str, style: ReasoningStyle) -> Parts:
    parser = ReasoningParser(style)
    return parser.push(text) + parser.flush()


@given(text=TEXTS, style=STYLES, data=st.data())
def test_any_split_gives_what_the_whole_gives(
    text: str, style: ReasoningStyle, data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text))).map(sorted))
    parser, parts = ReasoningParser(style), Parts()
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        parts += parser.push(text[start:end])
    assert parts + parser.flush() == naive(text, style)


@given(text=TEXTS, style=STYLES)
def test_one_character_at_a_time_gives_what_the_whole_gives(
    text: str, style: ReasoningStyle
) -> None:
    parser, parts, shown = ReasoningParser(style), Parts(), 0
    for count, character in enumerate(text, 1):
        parts += parser.push(character)
        shown = len(parts.reasoning) + len(parts.content)
        # Beside what may become a tag, only the tags that were found are missing.
        assert count - shown < len(OPEN) + 2 * len(CLOSE)
    assert parts + parser.flush() == whole(text, style)


@pytest.mark.parametrize(
    ("style", "text", "parts"),
    [
        ("deepseek_r1", "<think>why</think>so", Parts("why", "so")),
        ("deepseek_r1", "why</think>so", Parts("why", "so")),
        ("deepseek_r1", "why", Parts("why", "")),
        ("deepseek_r1", "why</thi", Parts("why</thi", "")),
        ("deepseek_r1", "</think>so</think>", Parts("", "so</think>")),
        ("qwen3", "<think>\nwhy\n</think>\n\nso", Parts("\nwhy\n", "\n\nso")),
        ("qwen3", "so", Parts("", "so")),
        ("qwen3", "so</think>", Parts("", "so</think>")),
        ("qwen3", "<think>why", Parts("why", "")),
        ("qwen3", "so <thi", Parts("", "so <thi")),
        ("qwen3", "<think>a</think>b<think>c</think>", Parts("a", "b<think>c</think>")),
        ("qwen3", "<<think>a", Parts("a", "<")),
        ("qwen3", "", Parts("", "")),
    ],
)
def test_what_is_thought_and_what_is_answer(style: ReasoningStyle, text: str, parts: Parts) -> None:
    assert whole(text, style) == parts


def test_text_is_shown_as_soon_as_it_is_settled() -> None:
    parser = ReasoningParser("qwen3")
    assert parser.push("1 <") == Parts(content="1 ")
    assert parser.push("2 <thi") == Parts(content="<2 ")
    assert parser.push("nk>a</") == Parts(reasoning="a")
    assert parser.push("b</think>c<") == Parts("</b", "c<")  # an answer waits for nothing


def test_every_style_begins_somewhere_and_no_place_is_left_twice() -> None:
    assert set(FIRST) == set(get_args(ReasoningStyle))
    assert set(TAGS) == set(Place)
    order = list(Place)
    for place, tags in TAGS.items():
        assert all(order.index(target) > order.index(place) for target in tags.values())
