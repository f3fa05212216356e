"""When a request ends, and how its next token is drawn, from its tokens alone."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pdserve.engine.sequence import Ending, Sequence, stretch_us
from pdserve.kvstore.keys import block_keys, namespace_digest
from pdserve.messages import Beams, FinishReason, Request, Route, Timing, Token
from tests.unit.engine.fakes import BLOCK_TOKENS, EOS, address
from tests.unit.engine.rig import NAMESPACE, TENANT, TOKENIZER, prompt, request

ROUTE = Route("p", "d", address("d"), None)  # type: ignore[arg-type]


def sequence(asked: Request, *, context_tokens: int = 400) -> Sequence:
    return Sequence(
        asked,
        ROUTE,
        asked.tokens,
        Timing(),
        keys=asked.block_keys,
        namespace=NAMESPACE,
        tokenizer=TOKENIZER,
        block_tokens=BLOCK_TOKENS,
        context_tokens=context_tokens,
    )


def endings(asked: Request, text: str) -> list[tuple[FinishReason, str | int | None] | None]:
    """The ending after each letter of ``text``, generated one by one."""
    one, seen = sequence(asked), []
    for letter in text:
        one.accept(Token(ord(letter) - ord("a")))
        seen.append((one.ending.finish, one.ending.stop_reason) if one.ending else None)
    return seen


def test_max_tokens_counts_generated_ones() -> None:
    assert endings(request(max_tokens=2), "ab") == [None, (FinishReason.LENGTH, None)]


def test_max_tokens_counts_over_all_attempts() -> None:
    again = request(tokens=prompt(12), prompt_tokens=10, max_tokens=3)
    assert endings(again, "a") == [(FinishReason.LENGTH, None)]


def test_the_end_of_sequence_token_ends_unless_ignored() -> None:
    assert endings(request(ignore_eos=False), "az") == [None, (FinishReason.STOP, None)]
    assert endings(request(ignore_eos=True), "az") == [None, None]


def test_a_stop_token_is_the_reason() -> None:
    assert endings(request(stop_token_ids=(2,)), "bc") == [None, (FinishReason.STOP, 2)]


def test_a_stop_string_over_several_tokens_is_the_reason() -> None:
    seen = endings(request(stop=("bcd", "x")), "abcd")
    assert seen == [None, None, None, (FinishReason.STOP, "bcd")]


def test_a_stop_string_counts_over_all_attempts() -> None:
    """The first attempt delivered "bc"; the second adds the "d"."""
    again = request(tokens=(*prompt(10), 1, 2), prompt_tokens=10, stop=("bcd",))
    assert endings(again, "d") == [(FinishReason.STOP, "bcd")]


def test_a_stop_string_in_the_prompt_does_not_count() -> None:
    assert endings(request(tokens=(1, 2), stop=("bcd",)), "d") == [None]


def test_a_full_context_ends_with_length() -> None:
    one = sequence(request(tokens=prompt(10)), context_tokens=11)
    one.accept(Token(0))
    assert one.ending is not None
    assert one.ending.finish is FinishReason.LENGTH


def test_a_request_without_room_for_a_token_has_ended() -> None:
    assert sequence(request(tokens=prompt(10)), context_tokens=10).ending is not None
    done = request(tokens=prompt(12), prompt_tokens=10, max_tokens=2)
    assert sequence(done).ending is not None


def test_the_next_token_is_drawn_by_its_index() -> None:
    again = request(tokens=prompt(12), prompt_tokens=10, choice=3, min_tokens=3)
    row = sequence(again).sampler_row()
    assert (row.index, row.choice, row.seed, row.prompt_tokens) == (2, 3, 1234, 10)


def test_below_min_tokens_what_would_end_it_is_forbidden() -> None:
    asked = request(ignore_eos=False, min_tokens=1, stop_token_ids=(3,))
    one = sequence(asked)
    assert one.sampler_row().forbidden == (3, EOS)
    one.accept(Token(0))
    assert one.sampler_row().forbidden == ()


def test_after_drafts_a_token_is_drawn_as_if_they_had_been_generated() -> None:
    asked = request(ignore_eos=False, min_tokens=2, stop_token_ids=(3,))
    drafted, plain = sequence(asked), sequence(asked)
    for drafts in ((), (7,), (7, 1), (7, 1, 7)):
        assert drafted.sampler_row(drafts) == plain.sampler_row()
        plain.accept(Token((7, 1, 7, 0)[len(drafts)]))
    assert drafted.generated_count == 0


def test_ignored_end_of_sequence_is_not_forbidden() -> None:
    assert sequence(request(ignore_eos=True, min_tokens=1)).sampler_row().forbidden == ()


def test_keys_grow_with_the_tokens() -> None:
    one = sequence(request(tokens=prompt(7)))
    assert len(one.keys(5)) == 1
    one.accept(Token(0))
    assert len(one.keys(5)) == 2


def test_a_stretch_is_not_negative_and_needs_a_beginning() -> None:
    assert stretch_us(Timing(since_unix_us=100), 150) == 50
    assert stretch_us(Timing(since_unix_us=100), 90) == 0
    assert stretch_us(Timing(), 90) == 0


def test_a_fork_has_the_past_that_has_kv_and_goes_on_alone() -> None:
    asked = replace(request(stop=("bcd",)), beams=Beams(2, 1))
    root = sequence(asked)
    root.kv_count = len(root.tokens)
    root.accept(Token(1))
    beam = root.fork()
    assert (beam.tokens, beam.blocks) == (list(asked.tokens), [])
    root.kv_count += 1
    root.accept(Token(2))
    fork = root.fork()
    fork.accept(Token(25))
    root.kv_count += 1
    assert root.would_end(3) == Ending(FinishReason.STOP, "bcd")
    assert root.would_end(4) is None
    assert fork.would_end(3) is None
    assert len(root.tokens) == len(fork.tokens) == 12


def test_the_candidate_that_a_beam_search_is_handed_over_with_ends_nothing() -> None:
    asked = request(tokens=(*prompt(10), EOS), prompt_tokens=10, ignore_eos=False)
    assert sequence(asked).ending is not None
    root = sequence(replace(asked, beams=Beams(3, 1)))
    assert root.ending is None
    assert root.tokens_left == 12
    assert root.sampler_row().sampling.logprobs == 6
    assert root.sampler_row().adjusted_logprobs


@given(st.integers(0, 6 * BLOCK_TOKENS), st.integers(0, 6))
def test_keys_of_another_version_s_blocks_are_never_used(length: int, known: int) -> None:
    """As of a gateway that still calls blocks as the former workers did: neither are those blocks
    read, nor is what is computed here stored as theirs."""
    tokens = prompt(length)
    other = namespace_digest(model="fake", weights="of before")
    theirs = block_keys(other, tokens, BLOCK_TOKENS, tenant=TENANT)
    ours = block_keys(NAMESPACE, tokens, BLOCK_TOKENS, tenant=TENANT)
    for told in (theirs, ours):
        one = sequence(replace(request(tokens=tokens), block_keys=told[:known]))
        assert one.keys(len(ours)) == ours
    assert not set(ours) & set(theirs)
