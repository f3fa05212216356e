"""The search alone: against every answer there is, and against a search that never stops early."""

import itertools
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.decode.beams import BeamSearch, Candidate, Finished
from pdserve.engine.sequence import Ending
from pdserve.messages import Beams, FinishReason

EOS = 0
PROMPT_TOKENS = 3


class Model:
    """Logprobs of a tiny vocabulary, another distribution after every answer so far."""

    def __init__(self, vocabulary: int, seed: int, *, spread: float = 3.0) -> None:
        self.vocabulary = vocabulary
        self._seed = seed
        self._spread = spread

    def logprobs(self, tokens: tuple[int, ...]) -> list[float]:
        chance = random.Random(f"{self._seed} {tokens}")
        logits = [chance.uniform(0, self._spread) for _ in range(self.vocabulary)]
        log_sum = math.log(sum(map(math.exp, logits)))
        return [logit - log_sum for logit in logits]

    def candidates(self, tokens: tuple[int, ...]) -> list[Candidate]:
        return sorted(enumerate(self.logprobs(tokens)), key=lambda one: -one[1])

    def logprob(self, tokens: Sequence[int]) -> float:
        return sum(
            self.logprobs(tuple(tokens[:index]))[token] for index, token in enumerate(tokens)
        )


def run(
    model: Model, beams: Beams, max_tokens: int, *, stops: bool = True
) -> tuple[list[Finished], int]:
    """The answers and how many steps they took; ``stops`` False: all steps are made."""
    search = BeamSearch(beams, prompt_tokens=PROMPT_TOKENS, generated_max=max_tokens, enders=(EOS,))
    steps = 0
    while search.live and not (stops and search.is_over):
        said = [tuple(token.token for token in live.tokens) for live in search.live]

        def ends(parent: int, token: int, length: int = steps + 1) -> Ending | None:
            if token == EOS:
                return Ending(FinishReason.STOP)
            return Ending(FinishReason.LENGTH) if length == max_tokens else None

        search.advance([model.candidates(tokens) for tokens in said], ends)
        steps += 1
    return search.best(), steps


def told(answers: Sequence[Finished]) -> list[tuple[int, ...]]:
    return [tuple(token.token for token in answer.tokens) for answer in answers]


def every_answer(vocabulary: int, max_tokens: int) -> list[tuple[int, ...]]:
    going_on = range(1, vocabulary)
    ended = [
        (*begun, EOS)
        for length in range(max_tokens)
        for begun in itertools.product(going_on, repeat=length)
    ]
    return [*ended, *itertools.product(going_on, repeat=max_tokens)]


@settings(max_examples=60)
@given(
    vocabulary=st.integers(2, 4),
    max_tokens=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.7, 1.0, 3.0]),
)
def test_as_wide_as_all_answers_it_finds_the_best(
    vocabulary: int, max_tokens: int, seed: int, length_penalty: float
) -> None:
    model = Model(vocabulary, seed)
    answers = every_answer(vocabulary, max_tokens)

    def score(tokens: tuple[int, ...]) -> float:
        length = PROMPT_TOKENS + len(tokens) - (tokens[-1] == EOS)
        return float(model.logprob(tokens) / length**length_penalty)

    found, _ = run(model, Beams(len(answers), len(answers), length_penalty), max_tokens)
    assert sorted(told(found)) == sorted(answers)
    scores = [score(tokens) for tokens in told(found)]
    assert scores == pytest.approx(sorted(map(score, answers), reverse=True))
    assert [answer.score for answer in found] == pytest.approx(scores)


@settings(max_examples=60)
@given(
    width=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    length_penalty=st.sampled_from([-2.0, 0.0, 0.5, 1.0, 2.5]),
)
def test_stopping_when_nothing_better_can_come_changes_nothing(
    width: int, seed: int, length_penalty: float
) -> None:
    model, beams = Model(5, seed, spread=4.0), Beams(width, width, length_penalty)
    early, early_steps = run(model, beams, 8)
    late, late_steps = run(model, beams, 8, stops=False)
    assert early == late
    assert early_steps <= late_steps == 8


def test_it_does_stop_before_the_last_token() -> None:
    steps = [run(Model(5, seed), Beams(2, 2, 0.0), 30)[1] for seed in range(10)]
    assert max(steps) < 30


def test_early_stopping_takes_the_first_that_finish() -> None:
    """For at least one of these models better answers would have come later."""
    differ = 0
    for seed in range(20):
        model = Model(4, seed)
        eager, eager_steps = run(model, Beams(2, 2, 2.0, early_stopping=True), 12)
        patient, patient_steps = run(model, Beams(2, 2, 2.0), 12)
        assert eager_steps <= patient_steps
        assert eager[0].score <= patient[0].score
        differ += eager != patient
    assert differ > 0


def test_a_higher_penalty_prefers_longer_answers() -> None:
    def lengths(length_penalty: float) -> int:
        return sum(
            len(told(run(Model(5, seed), Beams(4, 1, length_penalty), 8)[0])[0])
            for seed in range(10)
        )

    assert lengths(-2.0) < lengths(1.0) < lengths(4.0)


def test_ties_go_to_the_lower_token_and_the_better_parent() -> None:
    search = BeamSearch(Beams(2, 2), prompt_tokens=1, generated_max=5)

    def no_end(parent: int, token: int) -> None:
        return None

    first = search.advance([[(4, -1.0), (7, -1.0), (9, -1.0)]], no_end)
    assert [branch.token.token for branch in first] == [4, 7]
    second = search.advance([[(1, -2.0)], [(1, -2.0), (2, -2.0)]], no_end)
    assert [(branch.parent, branch.token.token) for branch in second] == [(0, 1), (1, 1)]


def test_what_is_forbidden_is_no_answer() -> None:
    search = BeamSearch(Beams(3, 3), prompt_tokens=1, generated_max=1, enders=(EOS,))
    candidates = [[(5, -0.1), (6, -2.4), (EOS, -math.inf)]]
    search.advance(candidates, lambda _, __: Ending(FinishReason.LENGTH))
    assert told(search.best()) == [(5,), (6,)]
    assert search.is_over


def test_logprobs_are_those_asked_for() -> None:
    def tokens(logprobs: int | None) -> object:
        search = BeamSearch(Beams(1, 1), prompt_tokens=1, generated_max=1, logprobs=logprobs)
        search.advance([[(5, -0.1), (6, -2.4)]], lambda _, __: Ending(FinishReason.LENGTH))
        ((token,),) = [answer.tokens for answer in search.best()]
        return token.logprob

    assert tokens(None) is None
    one = tokens(1)
    assert getattr(one, "logprob", None) == -0.1
    assert getattr(one, "top", None) == ((5, -0.1),)
