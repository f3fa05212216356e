"""Beam search over token logprobs: which answers go on, which have ended, when it is over. Pure.

A *hypothesis* is an answer so far. At each step every live hypothesis has its ``2 * width``
likeliest next tokens as candidates. A candidate that ends its answer is *finished*; of the others
the ``width`` with the highest logprobs, added up from the first token on, live on. Candidates are
gone through best first, so a stop string, which is costly to look for, is looked for only until
enough live; tokens that end an answer are cheap to see, and end it however unlikely they are.

    score = logprob / length ** length_penalty

where the length counts the prompt, and not a token that ended the answer: as vLLM has it, so that
the same request gives the same answers. Of the finished only the ``width`` best are kept, as no
more are ever asked for.

It is over when nothing lives; with ``early_stopping`` when ``width`` have finished; without it when
no live one can come to a better score than those. Logprobs only fall, so the best that a live one
may reach is its own logprob at the length, between now and the longest, that suits the penalty
best. Stopping there changes no answer: a search that went on to the last token gives the same.

Ties go to the parent that ranks higher, then to the lower token id; at equal scores to the answer
that finished first.

Source of the rules: vLLM's ``BeamSearchSequence`` and ``get_beam_search_score``.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from pdserve.engine.sequence import Ending
from pdserve.messages import Beams, FinishReason, Token, TokenLogprob

CANDIDATES_PER_WIDTH = 2
"""Even where half of a hypothesis' candidates end it, the others can fill the width."""

Candidate = tuple[int, float]  # a token and its logprob


@dataclass(frozen=True, slots=True)
class Hypothesis:
    tokens: tuple[Token, ...]
    logprob: float  # of all tokens together


@dataclass(frozen=True, slots=True)
class Finished:
    hypothesis: Hypothesis
    ending: Ending
    score: float

    @property
    def tokens(self) -> tuple[Token, ...]:
        return self.hypothesis.tokens


@dataclass(frozen=True, slots=True)
class Branch:
    """A live hypothesis as one step leaves it: the token that follows one of those before."""

    parent: int
    token: Token


class BeamSearch:
    """``live`` are best first, and each has a place in the next ``advance``."""

    def __init__(
        self,
        beams: Beams,
        *,
        prompt_tokens: int,
        generated_max: int,
        enders: Collection[int] = (),
        logprobs: int | None = None,
    ) -> None:
        """
        Args:
            generated_max: at most so many tokens are generated; whoever tells the endings knows it
                too.
            enders: tokens that end an answer wherever they appear.
            logprobs: how many of the best tokens are remembered in each place of an answer; None:
                not even the logprob of its own.
        """
        self._beams = beams
        self._prompt_tokens = prompt_tokens
        self._length_max = prompt_tokens + generated_max
        self._enders = frozenset(enders)
        self._logprobs = logprobs
        self.live = [Hypothesis((), 0.0)]
        self._finished: list[Finished] = []

    @property
    def n(self) -> int:
        """Answers that are asked for."""
        return self._beams.n

    @property
    def generated_count(self) -> int:
        """Tokens of the longest answer so far."""
        answers = (*self.live, *(finished.hypothesis for finished in self._finished))
        return max((len(answer.tokens) for answer in answers), default=0)

    @property
    def is_over(self) -> bool:
        if not self.live:
            return True
        if len(self._finished) < self._beams.width:
            return False
        return self._beams.early_stopping or self._attainable() <= self._finished[-1].score

    def advance(
        self,
        candidates: Sequence[Sequence[Candidate]],
        ends: Callable[[int, int], Ending | None],
    ) -> list[Branch]:
        """One step: the new live ones, best first.

        Args:
            candidates: for each live one its likeliest next tokens, best first.
            ends: the ending of the n-th live one if that token follows, None if it goes on.
        """
        assert len(candidates) == len(self.live), f"{len(candidates)} for {len(self.live)}"
        ranked = [
            (hypothesis.logprob + logprob, parent, token, logprob)
            for parent, hypothesis in enumerate(self.live)
            for token, logprob in candidates[parent][: CANDIDATES_PER_WIDTH * self._beams.width]
        ]
        ranked.sort(key=lambda candidate: -candidate[0])  # stable: ties stay in order
        live: list[Hypothesis] = []
        branches: list[Branch] = []
        for total, parent, token, logprob in ranked:
            if total == -math.inf:
                break  # forbidden, as all that follow
            has_place = len(live) < self._beams.width
            if not has_place and token not in self._enders:
                continue
            ending = ends(parent, token)
            told = self._told(token, logprob, candidates[parent])
            hypothesis = Hypothesis((*self.live[parent].tokens, told), total)
            if ending is not None:
                self._finished.append(Finished(hypothesis, ending, self._score(hypothesis, ending)))
            else:
                live.append(hypothesis)
                branches.append(Branch(parent, told))
        self._finished.sort(key=lambda finished: -finished.score)
        del self._finished[self._beams.width :]
        self.live = live
        return branches

    def best(self) -> list[Finished]:
        """The answers, best first; fewer than ``n`` where so many do not exist."""
        return self._finished[: self._beams.n]

    def _told(self, token: int, logprob: float, candidates: Sequence[Candidate]) -> Token:
        if self._logprobs is None:
            return Token(token)
        return Token(token, TokenLogprob(logprob, tuple(candidates[: self._logprobs])))

    def _score(self, hypothesis: Hypothesis, ending: Ending) -> float:
        length = self._prompt_tokens + len(hypothesis.tokens)
        if ending.finish is FinishReason.STOP and hypothesis.tokens[-1].token in self._enders:
            length -= 1
        return self._scaled(hypothesis.logprob, length)

    def _scaled(self, logprob: float, length: int) -> float:
        return float(logprob / length**self._beams.length_penalty)

    def _attainable(self) -> float:
        """The highest score that a live one may come to; the best of them has the best chance."""
        best = self.live[0]
        shortest = self._prompt_tokens + len(best.tokens)  # should its next token end it
        return max(
            self._scaled(best.logprob, shortest), self._scaled(best.logprob, self._length_max)
        )
