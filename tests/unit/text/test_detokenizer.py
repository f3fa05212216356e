import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.text.detokenizer import Detokenizer
from pdserve.text.tokenizer import Tokenizer
from tests.unit.text.support import END


def pushed(detokenizer: Detokenizer, tokens: list[int], cuts: list[int]) -> str:
    """All text of ``tokens``, pushed in pieces that end at ``cuts``."""
    bounds = [0, *sorted(cut % (len(tokens) + 1) for cut in cuts), len(tokens)]
    pushes = [detokenizer.push(tokens[a:b]) for a, b in itertools.pairwise(bounds)]
    return "".join(pushes) + detokenizer.flush()


@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data(), cuts=st.lists(st.integers(0, 100)))
def test_any_split_gives_the_text_of_all_tokens(
    small: Tokenizer, pieces: Tokenizer, skip: bool, data: st.DataObject, cuts: list[int]
) -> None:
    for tokenizer in (small, pieces):
        tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size)))
        text = pushed(Detokenizer(tokenizer, skip_special_tokens=skip), tokens, cuts)
        assert text == tokenizer.decode(tokens, skip_special_tokens=skip)


# The default model's vocabulary lacks some control bytes, so these characters are left out.
@given(text=st.text(st.characters(exclude_categories=["C"])), cuts=st.lists(st.integers(0, 100)))
def test_real_text_comes_back_whole(smollm: Tokenizer, text: str, cuts: list[int]) -> None:
    tokens = smollm.encode(text)
    assert pushed(Detokenizer(smollm, skip_special_tokens=False), tokens, cuts) == text


def test_half_a_character_waits_for_the_other_half(small: Tokenizer) -> None:
    detokenizer = Detokenizer(small)
    texts = [detokenizer.push([token]) for token in small.encode("a😀b")]
    assert texts == ["a", "", "", "", "😀", "b"]
    assert detokenizer.flush() == ""


def test_a_character_that_never_ends_is_shown_as_such(small: Tokenizer) -> None:
    detokenizer = Detokenizer(small)
    assert detokenizer.push(small.encode("😀")[:2]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_are_silent_or_not(small: Tokenizer) -> None:
    assert Detokenizer(small).push([END]) == ""
    assert Detokenizer(small, skip_special_tokens=False).push([END]) == "<|end|>"


def test_a_prompt_is_not_repeated_but_its_last_character_completed(small: Tokenizer) -> None:
    *prompt, last = small.encode("hello 😀")
    assert Detokenizer(small, prompt=prompt).push([last]) == "😀"


def test_the_first_space_after_a_prompt_is_kept(pieces: Tokenizer) -> None:
    tokens = pieces.encode("the")
    assert Detokenizer(pieces).push(tokens) == "the"
    assert Detokenizer(pieces, prompt=tokens).push(tokens) == " the"
    assert Detokenizer(pieces, prompt=[1]).push(tokens) == "the"


def test_a_fork_goes_on_alone(small: Tokenizer) -> None:
    smile, tear = small.encode("😀"), small.encode("😂")
    assert smile[:-1] == tear[:-1], "they differ in the last byte alone"
    detokenizer = Detokenizer(small)
    assert detokenizer.push(smile[:-1]) == ""
    fork = detokenizer.fork()
    assert fork.push(tear[-1:]) == "😂"
    assert detokenizer.push(smile[-1:]) == "😀"
