"""A constrained answer is the same wherever it is computed, and ends where its grammar says.

The reference draws one token after the other under one guide. Tokens are letters, and z is
end-of-sequence.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from pdserve.ids import RequestId
from pdserve.lifecycle import Phase
from pdserve.messages import Constraint, ConstraintKind, FinishReason, Preempt, Request, Sampling
from pdserve.model.ops import LayersTold
from pdserve.model.runner import Run
from pdserve.model.sampler import SamplerRow, sample
from pdserve.text.grammar import Grammars, Guide
from tests.unit.engine.fakes import EOS, entry, logits_of
from tests.unit.engine.rig import GREEDY, TOKENIZER, Rig, plain, prompt, request

HABIT = 3.0
WORDS = Constraint(ConstraintKind.REGEX, "([a-f]{1,12}[gy])+")
TREE = Constraint(ConstraintKind.LARK, 'start: "p" start "q" | ("a" | "d" | "e")~1..30 "x"')
LISTED = Constraint(ConstraintKind.CHOICE, '["debadebadebax", "debadebadebay", "a"]')
GRAMMARS = Grammars(TOKENIZER)


def asked_of(
    constraint: Constraint | None, sampling: Sampling, name: str = "r", max_tokens: int = 40
) -> Request:
    sampling = replace(sampling, constraint=constraint)
    return request(name, prompt(10), sampling=sampling, max_tokens=max_tokens, ignore_eos=False)


def reference(asked: Request) -> tuple[int, ...]:
    constraint = asked.sampling.constraint
    assert constraint is not None
    guide, tokens = Guide(GRAMMARS, constraint, ()), list(asked.tokens)
    while len(tokens) < asked.prompt_tokens + asked.stop.max_tokens and not guide.complete:
        kv = b"".join(entry(token, position) for position, token in enumerate(tokens))
        guide.look_ahead()
        row = SamplerRow(
            asked.sampling,
            asked.seed,
            asked.choice,
            len(tokens) - asked.prompt_tokens,
            tokens,
            asked.prompt_tokens,
            allowed=guide.allowed(0),
        )
        logits = torch.from_numpy(np.stack([logits_of(kv, habit=HABIT)]))
        (drawn,) = sample(logits, [row])
        tokens.append(drawn.token)
        guide.push(drawn.token)
        assert guide.problem is None
        if drawn.token == EOS:
            break
    return tuple(tokens[asked.prompt_tokens :])


def rig_of(speculation: Literal["off", "prompt_lookup"] = "off", workers: int = 2) -> Rig:
    rig = Rig(habit=HABIT, speculation=speculation, clock=lambda: 0)
    rig.prefill()
    for index in range(workers):
        rig.decode(f"d{index}")
    return rig


def answer(asked: Request, *, prefill: str = "p0") -> Rig:
    rig = rig_of()
    rig.send(asked, prefill=prefill)
    rig.run()
    rig.check_idle()
    return rig


def text(tokens: Sequence[int]) -> str:
    return TOKENIZER.decode(tokens)


CASES = pytest.mark.parametrize(
    "asked",
    [
        asked_of(constraint, sampling)
        for constraint in (WORDS, TREE, LISTED)
        for sampling in (GREEDY, Sampling(temperature=1.2, top_k=9, frequency_penalty=0.4))
    ],
    ids=lambda asked: f"{asked.sampling.constraint.kind}-{asked.sampling.temperature}",
)


# ── the same tokens ──────────────────────────────────────────────────────────────────────────────


@CASES
@pytest.mark.parametrize("prefill", ["p0", "d0"])
def test_handed_over_or_kept_the_tokens_are_the_references(asked: Request, prefill: str) -> None:
    rig = answer(asked, prefill=prefill)
    assert rig.tokens() == reference(asked)
    unconstrained = replace(asked, sampling=replace(asked.sampling, constraint=None))
    assert rig.tokens() != plain(unconstrained, habit=HABIT)[: len(rig.tokens())]


@CASES
def test_drafts_change_no_token(asked: Request) -> None:
    rig = rig_of("prompt_lookup")
    rig.send(asked)
    rig.run()
    rig.check_idle()
    assert rig.tokens() == reference(asked)


def test_drafts_that_a_grammar_allows_hold_and_the_others_are_not_computed() -> None:
    """The model goes round in a circle; the grammar has it leave after every fourth round."""
    circles = Constraint(ConstraintKind.REGEX, "((deba){1,4}x)+")
    asked = asked_of(circles, GREEDY)
    rig = rig_of("prompt_lookup")
    runner = rig.runners["d0"]
    compute, drafted = runner.step, list[tuple[int, Sequence[int]]]()

    def step(
        runs: Sequence[Run], drawn_R: torch.Tensor | None = None, told: LayersTold | None = None
    ) -> torch.Tensor:
        drafted.extend((run.start + 1 - len(asked.tokens), run.tokens[1:]) for run in runs)
        return compute(runs, drawn_R, told)

    runner.step = step  # type: ignore[method-assign]
    rig.send(asked)
    rig.run()
    expected = reference(asked)
    assert rig.tokens() == expected
    assert rig.worker("d0").load().counters["tokens_accepted"] > 5
    for generated_count, drafts in drafted:
        guide = Guide(GRAMMARS, circles, expected[:generated_count])
        guide.look_ahead()
        assert guide.fitting(drafts) == len(drafts)


@CASES
@pytest.mark.parametrize("every", [1, 3])
def test_parked_again_and_again_it_goes_on_the_same(asked: Request, every: int) -> None:
    rig = rig_of()
    rig.send(asked)
    rig.run_prefills()
    here, there = "d0", "d1"
    while RequestId("r") not in rig.deltas or rig.finish() is None:
        said = len(rig.tokens())
        while len(rig.tokens()) < said + every and rig.worker(here).busy():
            rig.step(rig.worker(here))
        if rig.finish() is not None:
            break
        rig.worker(here).handle(Preempt(asked.request, 0, Phase.DECODING))
        while rig.worker(here).busy() and not rig.parked:
            rig.step(rig.worker(here))
        while rig.parked:
            rig.resume(rig.parked.pop(0), there)
        here, there = there, here
    rig.run()
    assert rig.tokens() == reference(asked)
    rig.check_idle()


@CASES
def test_a_later_attempt_continues_from_what_was_delivered(asked: Request) -> None:
    expected = reference(asked)
    for delivered in range(1, len(expected), 4):
        again = request(
            tokens=asked.tokens + expected[:delivered],
            prompt_tokens=10,
            attempt=1,
            sampling=asked.sampling,
            max_tokens=40,
            ignore_eos=False,
        )
        deltas = answer(again).deltas[again.request]
        assert deltas[0].offset == delivered
        assert tuple(t.token for delta in deltas for t in delta.tokens) == expected[delivered:]


def test_in_company_everybody_gets_what_each_gets_alone() -> None:
    drawn = Sampling(temperature=1.2)
    together = [
        replace(asked_of(constraint, sampling, f"{index}{sampling.temperature}"), choice=index)
        for index, constraint in enumerate((WORDS, None, TREE, LISTED, None, WORDS))
        for sampling in (GREEDY, drawn)
    ]
    rig = rig_of("prompt_lookup")
    rig.resume_on = "d0"  # there are more than fit at once
    for asked in together:
        rig.send(asked)
    rig.run()
    rig.check_idle()
    for asked in together:
        if asked.sampling.constraint is not None:
            assert rig.tokens(asked.request) == reference(asked)
        else:
            tokens = rig.tokens(asked.request)
            assert tokens == plain(asked, habit=HABIT)[: len(tokens)]


# ── endings ──────────────────────────────────────────────────────────────────────────────────────


def ended(asked: Request) -> tuple[str, FinishReason | None]:
    rig = answer(asked)
    return text(rig.tokens()), rig.finish()


@pytest.mark.parametrize("max_tokens", [3, 20])
def test_where_nothing_may_follow_the_answer_stops_at_once(max_tokens: int) -> None:
    """Even where the limit falls on the same token, and sooner than ``min_tokens`` would have."""
    asked = asked_of(Constraint(ConstraintKind.CHOICE, '["abc"]'), GREEDY, max_tokens=max_tokens)
    assert ended(asked) == ("abc", FinishReason.STOP)
    late = replace(asked, stop=replace(asked.stop, max_tokens=20, min_tokens=8, ignore_eos=True))
    assert ended(late) == ("abc", FinishReason.STOP)


def test_a_token_limit_cuts_it() -> None:
    asked = asked_of(Constraint(ConstraintKind.REGEX, "(ab)+y"), GREEDY, max_tokens=5)
    assert ended(asked) == ("ababa", FinishReason.LENGTH)


def test_end_of_sequence_comes_only_where_the_text_may_end() -> None:
    """Biased towards z: it ends as soon as it may, is withheld up to ``min_tokens``, and for good
    where it is to be ignored."""
    biased = Sampling(temperature=0.0, logit_bias=((EOS, 100.0),))
    pairs = asked_of(Constraint(ConstraintKind.REGEX, "([a-f]{4})+"), biased, max_tokens=12)
    assert len(ended(pairs)[0]) == 4 + 1
    assert ended(pairs)[1] is FinishReason.STOP
    later = replace(pairs, stop=replace(pairs.stop, min_tokens=6))
    assert len(ended(later)[0]) == 8 + 1
    never = replace(pairs, stop=replace(pairs.stop, ignore_eos=True))
    letters, finish = ended(never)
    assert (len(letters), finish) == (12, FinishReason.LENGTH)
    assert "z" not in letters


def test_a_stop_string_of_the_client_ends_it_too() -> None:
    asked = asked_of(Constraint(ConstraintKind.CHOICE, '["abcdef"]'), GREEDY)
    assert ended(replace(asked, stop=replace(asked.stop, strings=("cd",)))) == (
        "abcd",
        FinishReason.STOP,
    )


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prefill", ["p0", "d0"])
@pytest.mark.parametrize(
    ("constraint", "delivered", "problem"),
    [
        (Constraint(ConstraintKind.REGEX, "(a"), (), "unclosed group"),
        (WORDS, (EOS, EOS), "doesn't satisfy the grammar"),
    ],
)
def test_a_grammar_that_fails_ends_its_request_and_no_other(
    prefill: str, constraint: Constraint, delivered: tuple[int, ...], problem: str
) -> None:
    broken = request(
        tokens=prompt(10) + delivered,
        prompt_tokens=10,
        attempt=1 if delivered else 0,
        sampling=replace(GREEDY, constraint=constraint),
    )
    rig = rig_of()
    other = asked_of(WORDS, GREEDY, "other")
    rig.send(broken, prefill=prefill)
    rig.send(other, prefill=prefill)
    rig.run()
    rig.check_idle()
    (delta,) = rig.deltas[broken.request]
    assert delta.finish is FinishReason.ERROR
    assert delta.error is not None
    assert delta.error.kind == "constraint_failed"
    assert problem in delta.error.message
    assert rig.events() == ["ended"]
    assert rig.tokens("other") == reference(other)
