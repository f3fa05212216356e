"""The sampler beside a naive one that sorts everything and computes in float64.

Random logits are multiples of 1/8: no filter's border then falls between two roundings, and ties
are frequent.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pdserve.messages import Sampling, Token
from pdserve.model.philox import uniform
from pdserve.model.sampler import (
    SamplerRow,
    adjusted,
    draw,
    kept_weights,
    repeating,
    sample,
    sample_on_device,
)

GREEDY = Sampling(temperature=0.0)
EIGHTHS = st.integers(-40, 40).map(lambda eighths: eighths / 8)
LOGITS = st.lists(EIGHTHS, min_size=1, max_size=40)


def row(sampling: Sampling, *, tokens: tuple[int, ...] = (), **fields: object) -> SamplerRow:
    plain = SamplerRow(sampling, seed=1, choice=0, index=0, tokens=tokens, prompt_tokens=0)
    return replace(plain, **fields)  # type: ignore[arg-type]


def logits_of(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def one(logits: torch.Tensor, wanted: SamplerRow) -> Token:
    (token,) = sample(logits, [wanted])
    return token


def as_on_a_device(logits: torch.Tensor, rows: list[SamplerRow]) -> list[Token]:
    from pdserve.model.kernels.sampling import drawn_tokens_reference

    return sample_on_device(logits, rows, drawn_tokens_reference)


def kept_ids(logits: list[float], sampling: Sampling) -> list[int]:
    _, kept = kept_weights(np.array(logits, dtype=np.float32), sampling)
    return list(range(len(logits))) if kept is None else [int(index) for index in kept]


def naive_probabilities(logits: list[float], sampling: Sampling) -> NDArray[np.float64]:
    """Of every token, after all filters."""
    scaled = np.array(logits, dtype=np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    order = sorted(range(len(logits)), key=lambda index: (-logits[index], index))
    if sampling.top_k:
        order = order[: sampling.top_k]
    total = sum(weights[index] for index in order)
    kept: list[int] = []
    for index in order:
        # A billionth of room: float32 and float64 round the goal and the sum differently.
        if sampling.top_p < 1 and sum(weights[kept]) >= sampling.top_p * total - 1e-9:
            break
        kept.append(index)
    best = weights[order[0]]
    kept = [index for index in kept if weights[index] >= sampling.min_p * best * (1 - 1e-9)]
    probabilities = np.zeros(len(logits))
    probabilities[kept] = weights[kept] / weights[kept].sum()
    return probabilities


# ── greedy ───────────────────────────────────────────────────────────────────────────────────────


@given(logits=LOGITS)
def test_greedy_takes_the_best_and_of_equals_the_lowest_id(logits: list[float]) -> None:
    assert one(logits_of(*logits), row(GREEDY)) == Token(logits.index(max(logits)))


def test_a_temperature_too_low_to_tell_from_greedy_is_greedy() -> None:
    assert one(logits_of(1.0, 2.0, 2.0), row(Sampling(temperature=1e-9))) == Token(1)


def test_logits_are_left_as_they_were() -> None:
    logits = logits_of(1.0, 2.0, 3.0)
    before = logits.clone()
    busy = Sampling(repetition_penalty=2.0, logit_bias=((0, 5.0),), top_p=0.5, logprobs=2)
    sample(logits, [row(busy, tokens=(2,), forbidden=(1,))])
    assert torch.equal(logits, before)


# ── penalties, bias, prohibitions ────────────────────────────────────────────────────────────────


def changed(logits: list[float], wanted: SamplerRow) -> list[float]:
    return [float(logit) for logit in adjusted(np.array(logits, dtype=np.float32), wanted)]


def test_repetition_counts_prompt_and_output_once_and_pushes_down_from_either_side() -> None:
    wanted = row(Sampling(repetition_penalty=2.0), tokens=(0, 0, 1), prompt_tokens=2)
    assert changed([4.0, -4.0, 4.0], wanted) == [2.0, -8.0, 4.0]


def test_frequency_and_presence_count_the_output_alone() -> None:
    sampling = Sampling(frequency_penalty=1.0, presence_penalty=0.5)
    wanted = row(sampling, tokens=(2, 0, 0, 1), prompt_tokens=1)
    assert changed([4.0, 4.0, 4.0], wanted) == [1.5, 2.5, 4.0]


def test_bias_is_added_and_prohibitions_come_last() -> None:
    wanted = row(Sampling(logit_bias=((0, 1.5), (2, 99.0))), forbidden=(2,))
    assert changed([0.0, 1.0, 0.0], wanted) == [1.5, 1.0, -math.inf]


def test_the_first_token_has_no_output_to_count() -> None:
    wanted = row(Sampling(presence_penalty=1.0), tokens=(0, 1), prompt_tokens=2)
    assert changed([1.0, 2.0], wanted) == [1.0, 2.0]


def test_greedy_looks_at_the_changed_logits() -> None:
    sampling = replace(GREEDY, presence_penalty=2.0)
    assert one(logits_of(1.0, 2.0), row(sampling, tokens=(1,))) == Token(0)
    assert one(logits_of(1.0, 2.0), row(GREEDY, forbidden=(1,))) == Token(0)


def test_a_bias_for_a_token_that_is_none_is_a_bug_of_the_border() -> None:
    for token in (-1, 2):
        with pytest.raises(AssertionError, match="bias for token"):
            one(logits_of(1.0, 2.0), row(replace(GREEDY, logit_bias=((token, 1.0),))))


# ── n-grams that must not come again ─────────────────────────────────────────────────────────────

# Few tokens, so that n-grams repeat.
HISTORIES = st.lists(st.integers(0, 3), max_size=24)


def naive_repeating(tokens: list[int], size: int) -> list[int]:
    """Each token that, put at the end, makes an n-gram that was there before."""
    seen = {tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)}
    end = tokens[len(tokens) - size + 1 :]
    return [token for token in range(4) if (*end, token) in seen]


@given(tokens=HISTORIES, size=st.integers(1, 30))
def test_repeating_tokens_agree_with_the_naive_ones(tokens: list[int], size: int) -> None:
    assert repeating(tokens, size).tolist() == naive_repeating(tokens, size)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@given(size=st.integers(1, 4), prompt=HISTORIES, seed=st.integers(0, 2**63 - 1))
def test_no_ngram_that_was_there_is_drawn_while_another_token_is_left(
    temperature: float, size: int, prompt: list[int], seed: int
) -> None:
    sampling = Sampling(temperature=temperature, no_repeat_ngram_size=size)
    logits = logits_of(3.0, 2.0, 1.0, 0.0)
    tokens = list(prompt)
    for index in range(12):
        wanted = row(sampling, tokens=tuple(tokens), seed=seed, index=index)
        token = one(logits, replace(wanted, prompt_tokens=len(prompt))).token
        repeated = naive_repeating(tokens, size)
        assert len(repeated) == 4 or token not in repeated
        # On a device, in company, and resumed with all of it as a prompt: the same.
        resumed = replace(wanted, prompt_tokens=len(tokens))
        both = as_on_a_device(logits.expand(2, -1), [row(GREEDY), resumed])
        assert [told.token for told in both] == [0, token]
        tokens.append(token)


def test_where_every_token_would_repeat_none_is_forbidden_for_that() -> None:
    sampling = replace(GREEDY, no_repeat_ngram_size=1)
    assert one(logits_of(1.0, 2.0), row(sampling, tokens=(0, 1))) == Token(1)
    assert one(logits_of(1.0, 2.0), row(sampling, tokens=(0,), forbidden=(1,))) == Token(0)


# ── filters ──────────────────────────────────────────────────────────────────────────────────────


@given(
    logits=LOGITS,
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    top_k=st.integers(0, 50),
    # None is a sum of equal shares, where the last bit would decide.
    top_p=st.sampled_from([0.0013, 0.1037, 0.3703, 0.5031, 0.7703, 0.9037, 0.9987, 1.0]),
    min_p=st.sampled_from([0.0, 0.011, 0.13, 0.57, 1.0]),
)
def test_filters_agree_with_the_naive_ones(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = naive_probabilities(logits, sampling)
    weights, kept = kept_weights(np.array(logits, dtype=np.float32), sampling)
    actual = np.zeros(len(logits))
    actual[slice(None) if kept is None else kept] = weights / weights.sum()
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-12)


def test_filters_agree_with_the_naive_ones_on_a_large_vocabulary() -> None:
    generator = np.random.default_rng(7)
    logits = (np.round(generator.standard_normal(5000) * 16) / 8).tolist()
    for sampling in (Sampling(top_p=0.9), Sampling(top_k=300, top_p=0.5), Sampling(min_p=0.2)):
        expected = np.flatnonzero(naive_probabilities(logits, sampling))
        assert kept_ids(logits, sampling) == expected.tolist()


def test_each_filter_by_hand() -> None:
    logits = [math.log(weight) for weight in (1, 4, 2, 8, 1)]  # of 16
    assert kept_ids(logits, Sampling()) == [0, 1, 2, 3, 4]
    assert kept_ids(logits, Sampling(top_k=2)) == [1, 3]
    assert kept_ids(logits, Sampling(top_p=0.7)) == [1, 3]
    assert kept_ids(logits, Sampling(top_p=0.8)) == [1, 2, 3]
    assert kept_ids(logits, Sampling(min_p=0.2)) == [1, 2, 3]
    # Top-p counts what top-k left: 8 of 14 is more than half.
    assert kept_ids(logits, Sampling(top_k=3, top_p=0.55)) == [3]


def test_of_equals_the_lowest_ids_stay() -> None:
    assert kept_ids([0.0] * 6, Sampling(top_k=2)) == [0, 1]
    assert kept_ids([0.0] * 6, Sampling(top_p=0.5)) == [0, 1, 2]
    assert kept_ids([0.0, 9.0, 0.0], Sampling(top_k=2)) == [0, 1]


def test_filters_that_cannot_bite_do_not() -> None:
    assert kept_ids([1.0, 2.0], Sampling(top_k=50)) == [0, 1]
    assert kept_ids([1.0, 2.0], Sampling(top_k=2)) == [0, 1]


@given(logits=LOGITS)
def test_the_tightest_filters_leave_the_best_token(logits: list[float]) -> None:
    best = logits.index(max(logits))
    for tight in (Sampling(top_k=1), Sampling(top_p=1e-12), Sampling(top_p=0.0)):
        assert one(logits_of(*logits), row(tight)) == Token(best)


@given(rest=st.integers(0, 20), top_p=st.sampled_from([0.0, 0.5, 1.0]), index=st.integers(0, 99))
def test_a_token_that_is_the_only_one_allowed_is_drawn(rest: int, top_p: float, index: int) -> None:
    logits = logits_of(*[-math.inf] * rest, -3.0, *[-math.inf] * rest)
    assert one(logits, row(Sampling(top_p=top_p), index=index)) == Token(rest)


@given(logits=LOGITS, temperature=st.sampled_from([1e-5, 1e-3, 1e3, 1e30]))
def test_extreme_temperatures_stay_in_the_vocabulary(
    logits: list[float], temperature: float
) -> None:
    logits[0] = -3e38  # divided by a small temperature it leaves float32
    token = one(logits_of(*logits), row(Sampling(temperature=temperature))).token
    assert 0 <= token < len(logits)
    if temperature < 1e-2 and len(logits) > 1:
        assert logits[token] == max(logits)


def test_a_model_that_failed_is_no_reason_to_draw() -> None:
    for logit in (math.nan, -math.inf):
        with pytest.raises(AssertionError, match="the model failed"):
            one(logits_of(logit, logit), row(Sampling()))


def test_wrong_shapes_and_types_are_bugs_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="1 rows of logits for 2 rows"):
        sample(logits_of(1.0), [row(GREEDY), row(GREEDY)])
    with pytest.raises(AssertionError, match="bfloat16"):
        sample(logits_of(1.0).bfloat16(), [row(GREEDY)])
    assert sample(torch.empty(0, 5), []) == []


# ── the draw ─────────────────────────────────────────────────────────────────────────────────────


@given(logits=LOGITS, seed=st.integers(0, 2**64 - 1), index=st.integers(0, 2**32 - 1))
def test_the_uniform_number_says_where_in_the_distribution(
    logits: list[float], seed: int, index: int
) -> None:
    wanted = row(Sampling(), seed=seed, index=index)
    token = one(logits_of(*logits), wanted).token
    upper = np.cumsum(naive_probabilities(logits, Sampling()))
    number = uniform(seed, 0, index)
    assert (upper[token - 1] if token else 0.0) - 1e-5 <= number <= upper[token] + 1e-5


def test_the_ends_of_the_interval_are_the_first_and_the_last_token() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    assert draw(logits, Sampling(), 0) == 0
    assert draw(logits, Sampling(), 2**53 - 1) == 999


def test_tokens_come_as_often_as_they_should() -> None:
    """Chi-square over 6 tokens, 4,096 draws: 5 degrees of freedom, p = 0.001 at 20.5."""
    sampling = Sampling(temperature=0.7, top_k=10, top_p=0.97, min_p=0.01)
    logits = [0.5, -1.0, 1.5, 0.0, 2.0, -9.0, 1.0, 0.25, -0.5, -8.0]
    expected = naive_probabilities(logits, sampling) * 4096
    likely = np.flatnonzero(expected)
    assert len(likely) == 6
    rows = [row(sampling, seed=5, index=index) for index in range(4096)]
    tokens = [token.token for token in sample(logits_of(*logits).expand(4096, -1), rows)]
    counts = np.bincount(tokens, minlength=len(logits))
    assert counts.sum() == counts[likely].sum()
    assert ((counts - expected)[likely] ** 2 / expected[likely]).sum() < 20.5


# ── logprobs ─────────────────────────────────────────────────────────────────────────────────────


@given(logits=LOGITS, count=st.integers(0, 50))
def test_logprobs_are_the_models_own(logits: list[float], count: int) -> None:
    busy = Sampling(temperature=0.5, top_k=2, logit_bias=((0, 3.0),), logprobs=count)
    token = one(logits_of(*logits), row(busy, tokens=(0,)))
    expected = np.array(logits) - np.log(np.exp(np.array(logits)).sum())
    assert token.logprob is not None
    assert token.logprob.logprob == pytest.approx(expected[token.token], abs=1e-5)
    order = sorted(range(len(logits)), key=lambda index: (-logits[index], index))[:count]
    assert [index for index, _ in token.logprob.top] == order
    assert [value for _, value in token.logprob.top] == pytest.approx(expected[order], abs=1e-5)


def test_no_logprobs_unless_asked_for() -> None:
    assert one(logits_of(1.0), row(GREEDY)).logprob is None


# ── identity ─────────────────────────────────────────────────────────────────────────────────────

KINDS = [
    GREEDY,
    replace(GREEDY, repetition_penalty=1.3, logprobs=3),
    Sampling(temperature=0.8),
    Sampling(temperature=0.8, top_p=0.95, logprobs=2),
    Sampling(temperature=1.3, top_k=40, top_p=0.9, min_p=0.02, frequency_penalty=0.3),
]


@pytest.mark.parametrize("vocabulary", [1001, 4096])
def test_a_row_gets_the_same_token_alone_and_in_any_company(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(20, vocabulary, generator=generator) * 2
    rows = [
        row(KINDS[i % len(KINDS)], seed=i, choice=i % 3, index=i, tokens=tuple(range(i + 1)))
        for i in range(20)
    ]
    together = sample(logits, rows)
    alone = [one(logits[i : i + 1].clone(), rows[i]) for i in range(20)]
    assert alone == together
    shuffled = torch.randperm(20, generator=generator).tolist()
    assert sample(logits[shuffled], [rows[i] for i in shuffled]) == [together[i] for i in shuffled]


@pytest.mark.parametrize("kinds", [KINDS, KINDS[:1], KINDS[1:]])
def test_the_way_of_a_gpu_gives_the_same_tokens(kinds: list[Sampling]) -> None:
    logits = torch.randn(20, 1001, generator=torch.Generator().manual_seed(3)) * 2
    logits[0, 7] = logits[0, 3] = 50.0  # a tie
    rows = [row(kinds[i % len(kinds)], seed=i, tokens=tuple(range(i + 1))) for i in range(20)]
    assert as_on_a_device(logits, rows) == sample(logits, rows)


@pytest.mark.gpu
def test_a_gpu_gives_the_tokens_of_the_host() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    logits = torch.randn(20, 4096, generator=torch.Generator().manual_seed(3)) * 2
    logits[0, 7] = logits[0, 3] = 50.0  # a tie
    rows = [row(KINDS[i % len(KINDS)], seed=i, tokens=tuple(range(i + 1))) for i in range(20)]
    assert sample(logits.cuda(), rows) == sample(logits, rows)


def test_adjusted_logprobs_are_those_of_what_is_left() -> None:
    biased = Sampling(temperature=0.0, logprobs=3, logit_bias=((1, 2.0),))
    logits = logits_of(1.0, 0.0, 0.5)
    model = one(logits, row(biased, forbidden=(2,))).logprob
    adjusted_ones = one(logits, row(biased, forbidden=(2,), adjusted_logprobs=True)).logprob
    assert model is not None
    assert adjusted_ones is not None
    assert [token for token, _ in model.top] == [0, 2, 1]
    assert [token for token, _ in adjusted_ones.top] == [1, 0, 2]
    best = -math.log(1 + math.exp(1.0 - 2.0))
    assert adjusted_ones.logprob == pytest.approx(best)
    assert adjusted_ones.top[2][1] == -math.inf


# ── grammars ─────────────────────────────────────────────────────────────────────────────────────


def mask_of(*tokens: int) -> bytes:
    return sum(1 << token for token in tokens).to_bytes(4, "little")


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_only_what_a_grammar_allows_is_drawn_whatever_speaks_against_it(temperature: float) -> None:
    logits = logits_of(*range(12))
    against = Sampling(
        temperature=temperature,
        logit_bias=((2, -100.0), (5, -100.0), (11, 100.0)),
        presence_penalty=2.0,
        no_repeat_ngram_size=1,
    )
    wanted = row(against, tokens=(2, 5), allowed=mask_of(2, 5), forbidden=(2, 5))
    drawn = {one(logits, replace(wanted, seed=seed)).token for seed in range(20)}
    assert drawn == ({5} if temperature == 0 else {2, 5})
    others = replace(wanted, forbidden=(5,))
    assert {one(logits, replace(others, seed=seed)).token for seed in range(20)} == {2}


def test_logprobs_of_a_constrained_token_are_the_models_own() -> None:
    logits = logits_of(3.0, 1.0, 2.0)
    asked = replace(GREEDY, logprobs=2)
    held = one(logits, row(asked, allowed=mask_of(1)))
    assert held.token == 1
    assert held.logprob is not None
    assert [token for token, _ in held.logprob.top] == [0, 2]
    assert held.logprob.logprob == pytest.approx(one(logits, row(asked)).logprob.top[0][1] - 2.0)  # type: ignore[union-attr]


def test_a_models_padding_is_never_allowed_and_a_larger_tokenizer_harms_nothing() -> None:
    padded = logits_of(*[0.0] * 40, 9.0)
    assert one(padded, row(GREEDY, allowed=mask_of(7))).token == 7
    assert one(logits_of(1.0, 2.0), row(GREEDY, allowed=mask_of(9))).token == 1


def test_the_way_of_a_gpu_knows_grammars() -> None:
    logits = torch.stack([logits_of(1.0, 3.0, 2.0)[0]] * 2)
    rows = [row(GREEDY), row(GREEDY, allowed=mask_of(0, 2))]
    assert [token.token for token in as_on_a_device(logits, rows)] == [1, 2]
