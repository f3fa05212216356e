"""What prompt lookup finds: the same as somebody who reads the whole text each time."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pdserve.decode.drafting import NGRAM_LENGTHS, READ_TOKENS_MAX, PromptLookup


def looked_up(tokens: list[int], count: int) -> list[int]:
    """The latest earlier place of the longest n-gram that the text ends with, and what followed."""
    for length in NGRAM_LENGTHS:
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[len(tokens) - length :]:
                text = list(tokens)
                for index in range(count):
                    text.append(text[end + index])
                return text[len(tokens) :]
    return []


@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(0, 5),
)
def test_it_finds_what_a_search_of_the_whole_text_finds(
    text: list[int], strides: list[int], count: int
) -> None:
    lookup, tokens = PromptLookup(), list[int]()
    for stride in strides:
        tokens += text[len(tokens) : len(tokens) + stride]
        assert lookup.draft(tokens, count) == looked_up(tokens, count)


def test_a_longer_match_outweighs_a_later_one() -> None:
    assert PromptLookup().draft([5, 1, 2, 3, 4, 9, 3, 4, 8, 1, 2, 3, 4], 2) == [9, 3]


def test_of_equal_matches_the_latest_counts() -> None:
    assert PromptLookup().draft([1, 2, 7, 1, 2, 8, 1, 2], 1) == [8]


def test_a_text_that_repeats_itself_is_gone_on_with_beyond_its_end() -> None:
    assert PromptLookup().draft([1, 2, 3, 1, 2, 3], 5) == [1, 2, 3, 1, 2]


def test_one_token_alone_is_too_little_to_go_by() -> None:
    assert PromptLookup().draft([1, 2, 1], 3) == []


def test_a_long_text_is_read_once() -> None:
    lookup, tokens = PromptLookup(), CountedReads(range(1000))
    lookup.draft(tokens, 4)
    assert tokens.reads > 1000
    before = tokens.reads
    tokens.append(7)
    lookup.draft(tokens, 4)
    assert tokens.reads - before <= 2 * len(NGRAM_LENGTHS)


def test_a_prompt_too_long_for_one_step_is_read_over_several() -> None:
    lookup, tokens = PromptLookup(), [1, 2, *range(10, 10 + READ_TOKENS_MAX), 8, 9, 7, 8, 9]
    assert lookup.draft(tokens, 1) == []
    assert lookup.draft(tokens, 1) == [7]


class CountedReads(list[int]):
    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)
