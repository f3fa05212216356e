"""What a draft model says of many texts at once: what it would say of each alone, from scratch."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.decode.draft_model import READ_TOKENS_MAX, DraftedText, DraftModel
from pdserve.decode.drafting import Asked, Drafter
from tests.unit.engine.fakes import BLOCK_TOKENS, VOCABULARY, FakeRunner, entry, logits_of

HABIT = 2.0


def said(tokens: Sequence[int], count: int) -> list[int]:
    """The most likely tokens one after the other, by the text alone."""
    text = list(tokens)
    for _ in range(count):
        kv = b"".join(entry(token, position) for position, token in enumerate(text))
        text.append(int(np.argmax(logits_of(kv, habit=HABIT))))
    return text[len(tokens) :]


def model_of(block_count: int = 200, *, vocab_size: int = VOCABULARY) -> DraftModel:
    runner = FakeRunner(block_count, habit=HABIT)
    return DraftModel(runner, vocab_size=vocab_size, clock=lambda: 0)


def in_turn(model: DraftModel, drafter: Drafter, tokens: Sequence[int], count: int) -> list[int]:
    return model.draft([Asked(drafter, tokens, count)])[0]


@given(st.integers(0, 1 << 30))
def test_whatever_came_of_earlier_drafts_it_says_what_the_text_alone_makes_it_say(
    seed: int,
) -> None:
    """Drafts that hold in part, texts that wait, that end, and that go on by many tokens at once;
    blocks are few enough that some texts find none."""
    chance = random.Random(seed)
    model = model_of(block_count=chance.choice((8, 14, 60)))
    texts: dict[Drafter, list[int]] = {}
    for _ in range(30):
        if len(texts) < 4 and chance.random() < 0.5:
            length = chance.randrange(1, 30)
            texts[model.begin()] = [chance.randrange(VOCABULARY) for _ in range(length)]
        asked = [
            Asked(drafter, tokens, chance.randrange(5))
            for drafter, tokens in texts.items()
            if chance.random() < 0.8
        ]
        drafts = model.draft(asked)
        for one, written in zip(asked, drafts, strict=True):
            assert written in ([], said(one.tokens, one.count))
            tokens = texts[one.drafter]
            tokens += written[: chance.randrange(len(written) + 1)]
            tokens += [chance.randrange(VOCABULARY) for _ in range(chance.choice((1, 1, 1, 7)))]
        for drafter in [one for one in texts if chance.random() < 0.05]:
            drafter.end()
            del texts[drafter]
    held = [one for one in texts if isinstance(one, DraftedText)]
    blocks = [block for one in held for block in one.blocks]
    assert len(set(blocks)) == len(blocks)
    assert len(blocks) + model.free_count == model._runner.pool.block_count


def test_drafts_that_held_are_not_read_again() -> None:
    model = model_of()
    drafter, text = model.begin(), [1, 2, 3, 4, 0]
    drafts = in_turn(model, drafter, text, 3)
    steps = model._runner.steps  # type: ignore[attr-defined]
    assert steps == [[5], [1], [1]]
    steps.clear()
    in_turn(model, drafter, [*text, *drafts[:2], 4 - drafts[2]], 2)
    assert steps == [[1], [1]]


def test_texts_are_drafted_for_together() -> None:
    model = model_of()
    texts = [[1, 2, 3], [4, 0, 1, 2], [3, 3]]
    counts = [3, 1, 2]
    asked = [Asked(model.begin(), text, count) for text, count in zip(texts, counts, strict=True)]
    assert model.draft(asked) == [said(one.tokens, one.count) for one in asked]
    assert model._runner.steps == [[3, 4, 2], [1, 1], [1]]  # type: ignore[attr-defined]


def test_a_long_text_is_read_over_several_calls_and_others_wait_no_longer_for_it() -> None:
    model = model_of()
    long, short = [index % 5 for index in range(READ_TOKENS_MAX + 40)], [1, 2]
    first, second = model.begin(), model.begin()
    both = [Asked(first, long, 1), Asked(second, short, 1)]
    assert model.draft(both) == [[], []]
    assert model.draft(both) == [said(long, 1), said(short, 1)]
    computed = [sum(step) for step in model._runner.steps]  # type: ignore[attr-defined]
    assert computed == [READ_TOKENS_MAX, 42]


def test_at_the_end_of_its_context_it_says_no_more() -> None:
    model = model_of(2000)
    context = model._runner.architecture.context_tokens
    for missing, written in ((2, 3), (0, 1), (-1, 0)):
        drafter, text = model.begin(), [1] * (context - missing)
        while True:  # read over several calls
            drafts = in_turn(model, drafter, text, 5)
            known = drafter.known  # type: ignore[attr-defined]
            if drafts or known >= len(text) - 1 or not known:
                break
        assert len(drafts) == written
        drafter.end()


def test_without_a_block_there_are_no_drafts_until_one_is_free() -> None:
    model = model_of(2)
    first, second = model.begin(), model.begin()
    text = [1] * BLOCK_TOKENS
    assert in_turn(model, first, text, 2) == said(text, 2)
    assert in_turn(model, second, text, 2) == []
    first.end()
    assert in_turn(model, second, text, 2) == said(text, 2)


def test_ending_twice_is_ending_once() -> None:
    model = model_of(8)
    drafter = model.begin()
    drafter.draft([1, 2, 3], 2)
    drafter.end()
    drafter.end()
    assert model.free_count == 8


@pytest.mark.parametrize("vocab_size", [2, 4])
def test_it_says_nothing_that_the_large_model_has_no_token_for(vocab_size: int) -> None:
    model = model_of(vocab_size=vocab_size)
    drafts = in_turn(model, model.begin(), [0, 1, 0], 20)
    assert len(drafts) == 20
    assert max(drafts) < vocab_size


def test_its_time_is_that_of_a_pass_over_so_many_rows() -> None:
    now_ns = iter(range(0, 1_000_000_000, 1_000_000))
    model = DraftModel(FakeRunner(), vocab_size=VOCABULARY, clock=lambda: next(now_ns))
    in_turn(model, model.begin(), [1, 2, 3], 2)
    us = model.pass_us()
    assert (us(1), us(3)) == (1000, 1000)
    assert model_of().pass_us()(1) is None
