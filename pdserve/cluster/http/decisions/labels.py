"""How likely each of a question's answers is, read from the distribution over next tokens. Pure.

An answer is a *label*: a short text, tokenised as the beginning of the model's turn. Where it has
several tokens the whole label counts: its log-probability is the sum over its tokens, each after
those before it. The labels' probabilities are their shares of the labels' sum: the model's own,
given that it says one of them.

That is a comparison only where no label is the beginning of another, or "good" would have what
"good enough" has. Such labels, and equal ones (the text "true" and the truth value), are written as
JSON, where a text ends with its quote.

    label   "billing" = (31, 8)   "bug" = (55,)   "other" = (31, 9)
    stems   () → {55}             one pass of prompt + stem gives the tokens of the stem, and all
            (31,) → {8, 9}        labels that go on from it with one token more

So a question whose labels have one token each is one pass, and one whose labels have k different
stems is k passes, of which all but the first find the question cached.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Tokens = tuple[int, ...]
Value = str | bool

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Label:
    text: str
    tokens: Tokens  # never none


class UnclearLabels(ValueError):
    """No way to write them makes them different labels; ``index`` is of one of them."""

    def __init__(self, index: int) -> None:
        super().__init__(f"label {index} is no label of its own")
        self.index = index


def labels_of(values: Sequence[Value], encode: Encode) -> list[Label]:
    """How the model is to write each of ``values``: as it stands, or where that is not clear, as
    JSON.

    Raises:
        UnclearLabels: two of them are the same, or one has no token.
    """
    found = _written(
        [value if isinstance(value, str) else _json(value) for value in values], encode
    )
    if _unclear(found) is not None:
        found = _written([_json(value) for value in values], encode)
    at_fault = _unclear(found)
    if at_fault is not None:
        raise UnclearLabels(at_fault)
    return found


def stems_of(labels: Sequence[Label]) -> dict[Tokens, Tokens]:
    """Each beginning of labels, all but their last token, with the last tokens that follow it."""
    stems: dict[Tokens, Tokens] = {}
    for label in labels:
        *stem, last = label.tokens
        stems[tuple(stem)] = (*stems.get(tuple(stem), ()), last)
    return stems


def probabilities(
    labels: Sequence[Label], found: Mapping[Tokens, tuple[float, Mapping[int, float]]]
) -> list[float]:
    """Of each label, given that it is one of them; they sum to 1.

    Args:
        found: by stem, its log-probability and that of each token behind it, natural logarithms.
    """
    logs = []
    for label in labels:
        *stem, last = label.tokens
        before, behind = found[tuple(stem)]
        logs.append(before + behind[last])
    best = max(logs)
    if best == -math.inf:  # the model says none of them, and prefers none
        return [1 / len(logs)] * len(logs)
    shares = [math.exp(log - best) for log in logs]
    whole = math.fsum(shares)
    return [share / whole for share in shares]


def expected(shares: Sequence[float]) -> float:
    """The mean of the levels' numbers, which count from 0, by their probabilities."""
    mean = math.fsum(level * share for level, share in enumerate(shares))
    return min(mean, float(len(shares) - 1))  # what rounding adds is no level


def _written(texts: Sequence[str], encode: Encode) -> list[Label]:
    return [Label(text, tuple(encode(text))) for text in texts]


def _unclear(labels: Sequence[Label]) -> int | None:
    """The index of a label that another one begins with, is equal to, or that has no token."""
    order = sorted(range(len(labels)), key=lambda index: labels[index].tokens)
    for index in order:
        if not labels[index].tokens:
            return index
    for index, following in pairwise(order):
        tokens = labels[index].tokens
        if labels[following].tokens[: len(tokens)] == tokens:
            return index if labels[index].tokens != labels[following].tokens else following
    return None


def _json(value: Value) -> str:
    return json.dumps(value, ensure_ascii=False)
