"""From logits to the next token of each sequence.

In this order: repetition penalty (prompt and output), frequency and presence penalty (output),
logit bias, what a grammar allows, forbidden tokens, tokens that would repeat an n-gram;
temperature; top-k; top-p of what is left; min-p; one draw. A prohibition that would leave no token
is not applied, so what a grammar allows outweighs those after it.

*Weights are whole numbers.* A token's weight is exp((logit - best) / temperature), scaled by 2**44
and cut to an integer. Sums of integers are exact in any order, so top-p may add from the heaviest
token on and the draw in order of ids, and both see the same total to the last bit. What the cut
loses is less than 2**-44 of the best token's weight per token.

*A row's token depends on that row alone.* Rows are worked on one by one, with NumPy on the host:
its elementwise loops give an element the same bits wherever it stands, which the batched reductions
of a tensor library do not promise. A row also stays in the processor's cache that way.

*On a GPU* (``sample_on_device``) rows are drawn where they are, and only the token comes back;
those that want logprobs or change the logits move and are worked on here. Either way their weights
are the portable ones (``whole_weights``), the same bits on every GPU and on this host: neither what
a request wants to know besides nor which GPU goes on with it changes a token. A CPU's rows have
NumPy's exponential instead, which is quicker there. The two differ by at most some millionths of a
weight, and so, about once in a million tokens, in the token; their logits differ more.

*Logprobs* are those of the model itself, before penalties, bias and temperature, as clients of the
OpenAI API know them: they say what the model believes, not what the request did to it. A beam
search adds up those of what it searches, which penalties, bias and prohibitions are a part of
(``adjusted_logprobs``).

Ties go to the lowest token id, everywhere.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pdserve.messages import Sampling, Token, TokenLogprob
from pdserve.model.philox import UNIFORM_BITS, uniform_bits
from pdserve.model.whole_weights import (
    WEIGHT_BITS,
    Logits,
    Weights,
    host_weights,
    portable_weights,
    power_factor,
)

Indices = NDArray[np.int64]
Weigh = Callable[[Logits, float], Weights]
"""From logits and a temperature to weights."""

Drawn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``kernels.sampling.drawn_tokens``, or its reference."""

GREEDY_BELOW_TEMPERATURE = 1e-5
"""Below it, logits that differ in float32's last place already differ in weight by a factor."""

VOCABULARY_MAX = 1 << 18
"""The sum of so many weights still fits into 63 bits."""


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """What one sequence asks of its next token."""

    sampling: Sampling
    seed: int
    choice: int
    index: int  # how many tokens were generated before
    tokens: Sequence[int]  # prompt and output so far
    prompt_tokens: int  # how many of them are the prompt
    forbidden: tuple[int, ...] = ()  # end-of-sequence and stop tokens while below min_tokens
    adjusted_logprobs: bool = False  # as penalties, bias and prohibitions leave the logits
    allowed: bytes | None = None  # by a grammar: a bit per token, lowest first; None: all are


def sample(logits_RV: torch.Tensor, rows: Sequence[SamplerRow]) -> list[Token]:
    """The next token of each row; ``logits_RV`` is float32, on any device, and left unchanged."""
    assert logits_RV.dtype == torch.float32, logits_RV.dtype
    assert len(logits_RV) == len(rows), f"{len(logits_RV)} rows of logits for {len(rows)} rows"
    assert logits_RV.shape[1] <= VOCABULARY_MAX, logits_RV.shape
    if logits_RV.device.type == "cpu":
        return [_next(logits_V, row) for logits_V, row in zip(_host(logits_RV), rows, strict=True)]
    from pdserve.model.kernels.sampling import drawn_tokens  # needs Triton, as only GPUs do

    return sample_on_device(logits_RV, rows, drawn_tokens)


def sample_on_device(
    logits_RV: torch.Tensor, rows: Sequence[SamplerRow], drawn_tokens: Drawn
) -> list[Token]:
    """``sample`` where moving logits costs: only rows that need more than a token move."""
    greedy, drawn, others = _by_way(rows)
    best = logits_RV[greedy].argmax(dim=-1).tolist()
    tokens = {index: Token(token) for index, token in zip(greedy, best, strict=True)}
    settings_RS = _settings([rows[index] for index in drawn], logits_RV.shape[1])
    found = drawn_tokens(logits_RV[drawn], settings_RS.to(logits_RV.device)).tolist()
    for index, token in zip(drawn, found, strict=True):
        assert token >= 0, f"row {index} has no best logit: the model failed"
        tokens[index] = Token(token)
    for index, logits_V in zip(others, _host(logits_RV[others]), strict=True):
        tokens[index] = _next(logits_V, rows[index], portable_weights)
    return [tokens[index] for index in range(len(rows))]


def _by_way(rows: Sequence[SamplerRow]) -> tuple[list[int], list[int], list[int]]:
    """The rows of which only the best token matters, those that are only drawn, and all others."""
    ways: tuple[list[int], list[int], list[int]] = ([], [], [])
    for index, row in enumerate(rows):
        moves = row.sampling.logprobs is not None or _changes_logits(row)
        ways[2 if moves else 0 if is_plain(row) else 1].append(index)
    return ways


def _settings(rows: Sequence[SamplerRow], vocabulary: int) -> torch.Tensor:
    """[R, 5] float64, as ``kernels.sampling`` wants them: every whole number in it is exact."""
    table = np.empty((len(rows), 5))
    for settings, row in zip(table, rows, strict=True):
        sampling = row.sampling
        settings[:] = (
            power_factor(sampling.temperature),
            sampling.top_k if 0 < sampling.top_k < vocabulary else 0,
            sampling.top_p,
            math.ceil(sampling.min_p * 2.0**WEIGHT_BITS),
            uniform_bits(row.seed, row.choice, row.index),
        )
    return torch.from_numpy(table)


def _host(logits_RV: torch.Tensor) -> Logits:
    array: Logits = logits_RV.detach().cpu().numpy()
    return array


def _is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < GREEDY_BELOW_TEMPERATURE


def is_plain(row: SamplerRow) -> bool:
    """Whether the best logit, as the model gave it, is all that matters."""
    return _is_greedy(row.sampling) and row.sampling.logprobs is None and not _changes_logits(row)


def _changes_logits(row: SamplerRow) -> bool:
    sampling = row.sampling
    return bool(
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
        or sampling.logit_bias
        or sampling.no_repeat_ngram_size
        or row.forbidden
        or row.allowed is not None
    )


def _next(logits_V: Logits, row: SamplerRow, weigh: Weigh = host_weights) -> Token:
    wanted_V = adjusted(logits_V, row) if _changes_logits(row) else logits_V
    if _is_greedy(row.sampling):
        token = int(np.argmax(wanted_V))  # the first of equals
    else:
        bits = uniform_bits(row.seed, row.choice, row.index)
        token = draw(wanted_V, row.sampling, bits, weigh)
    if row.sampling.logprobs is None:
        return Token(token)
    scored_V = wanted_V if row.adjusted_logprobs else logits_V
    return Token(token, logprob_of(scored_V, token, row.sampling.logprobs))


def adjusted(logits_V: Logits, row: SamplerRow) -> Logits:
    """A copy of ``logits_V`` with penalties, bias and prohibitions in it."""
    logits_V = logits_V.copy()
    sampling = row.sampling
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(_ids(row.tokens))
        logits = logits_V[seen]
        penalty = np.float32(sampling.repetition_penalty)
        logits_V[seen] = np.where(logits > 0, logits / penalty, logits * penalty)
    if sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0:
        seen, counts = np.unique(_ids(row.tokens[row.prompt_tokens :]), return_counts=True)
        penalties = sampling.frequency_penalty * counts + sampling.presence_penalty
        logits_V[seen] -= penalties.astype(np.float32)
    for token, bias in sampling.logit_bias:
        assert 0 <= token < len(logits_V), f"bias for token {token} of {len(logits_V)}"
        logits_V[token] += np.float32(bias)
    if row.allowed is not None:
        logits_V = _only(logits_V, row.allowed)
    if row.forbidden:
        _forbid(logits_V, _ids(row.forbidden))
    if sampling.no_repeat_ngram_size:
        _forbid(logits_V, repeating(row.tokens, sampling.no_repeat_ngram_size))
    return logits_V


def _only(logits_V: Logits, allowed: bytes) -> Logits:
    """``logits_V`` where a bit is set, and -inf elsewhere; as it was where that is everywhere.

    Selecting by a mask takes a quarter of the time of writing to the indices of what is out.
    """
    bits = np.frombuffer(allowed, dtype=np.uint8)
    allowed_V = np.unpackbits(bits, count=len(logits_V), bitorder="little").view(np.bool_)
    held_V = np.where(allowed_V, logits_V, np.float32(-np.inf))
    return held_V if held_V.max() > -np.inf else logits_V


def _forbid(logits_V: Logits, tokens: Indices) -> None:
    """In place; not applied where it would leave nothing to draw."""
    best = logits_V.max()
    logits_V[tokens], kept = -np.inf, logits_V[tokens]
    if logits_V.max() == -np.inf < best:
        logits_V[tokens] = kept


def repeating(tokens: Sequence[int], size: int) -> Indices:
    """The tokens that would make of the end of ``tokens`` an n-gram of ``size`` that is in them.

    As ``transformers`` has it: prompt and output alike, and of size 1 every token that is there.
    """
    assert size > 0, size
    ids = _ids(tokens)
    # Ends of n-grams, first any, then those whose tokens before it are our last ones, last first:
    # a token that is rare leaves few candidates to the next comparison.
    ends = np.arange(size - 1, len(ids))
    for back in range(1, size):
        if not len(ends):
            break
        ends = ends[ids[ends - back] == ids[-back]]
    return np.unique(ids[ends])


def draw(logits_V: Logits, sampling: Sampling, bits: int, weigh: Weigh = host_weights) -> int:
    """The token that the uniform number ``bits`` / 2**53 falls on, kept tokens in order of id."""
    weights, kept = kept_weights(logits_V, sampling, weigh)
    sums = np.cumsum(weights)
    target = int(sums[-1]) * bits >> UNIFORM_BITS  # exact, and below the sum
    position = int(np.searchsorted(sums, target, side="right"))
    return position if kept is None else int(kept[position])


def kept_weights(
    logits_V: Logits, sampling: Sampling, weigh: Weigh = host_weights
) -> tuple[Weights, Indices | None]:
    """The weights left after all filters, and whose they are, by id; None: all tokens."""
    kept = None
    if 0 < sampling.top_k < len(logits_V):
        kept = np.sort(_best(logits_V, sampling.top_k))
        logits_V = logits_V[kept]
    weights = weigh(logits_V, sampling.temperature)
    if sampling.top_p < 1.0:
        chosen = _nucleus(weights, sampling.top_p)
        weights, kept = weights[chosen], chosen if kept is None else kept[chosen]
    if sampling.min_p > 0.0:
        chosen = np.flatnonzero(weights >= sampling.min_p * int(weights.max()))
        weights, kept = weights[chosen], chosen if kept is None else kept[chosen]
    return weights, kept


def logprob_of(logits_V: Logits, token: int, top_count: int) -> TokenLogprob:
    """The log-probability of ``token`` and the ``top_count`` best, under the model alone."""
    best = logits_V.max()
    # float32 for the terms, float64 for their sum: the error stays at a float32's own.
    log_sum = float(best) + math.log(float(np.exp(logits_V - best).sum(dtype=np.float64)))
    top = _best(logits_V, min(top_count, len(logits_V))) if top_count else ()
    return TokenLogprob(
        float(logits_V[token]) - log_sum,
        tuple((int(index), float(logits_V[index]) - log_sum) for index in top),
    )


def _best(logits_V: Logits, count: int) -> Indices:
    """The ids of the ``count`` highest logits, best first, of equals the lowest id first."""
    threshold = np.partition(logits_V, len(logits_V) - count)[len(logits_V) - count]
    candidates = np.flatnonzero(logits_V >= threshold)
    order = np.argsort(-logits_V[candidates], kind="stable")
    best: Indices = candidates[order[:count]]
    return best


def _nucleus(weights: Weights, top_p: float) -> Indices:
    """The smallest set of heaviest tokens that holds ``top_p`` of the weight, in order of id.

    Sorting the weights without their ids is several times faster than sorting both, and enough:
    the lightest weight that is still in says which ids are, and how many of the equals.
    """
    total = int(weights.sum())
    missing = min(max(1, math.ceil(top_p * total)), total)
    # Tokens below this weight hold less than what may be left out, even if all tokens were such.
    floor = max(1, (total - missing) // len(weights))
    candidates = np.flatnonzero(weights >= floor)
    weights = weights[candidates]
    descending = np.sort(weights)[::-1]
    count = int(np.searchsorted(np.cumsum(descending), missing)) + 1
    lightest = descending[count - 1]
    is_in = weights > lightest
    equals = np.flatnonzero(weights == lightest)
    is_in[equals[: count - np.count_nonzero(is_in)]] = True
    nucleus: Indices = candidates[np.flatnonzero(is_in)]
    return nucleus


def _ids(tokens: Sequence[int]) -> NDArray[Any]:
    return np.asarray(tokens, dtype=np.int64)
