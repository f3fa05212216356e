"""Guesses at what a sequence says next, for the model to check. Pure.

A wrong guess costs a row of a step and never a token: what is sent is what the sampler draws, and
drafts only say which rows are worth computing together. So a drafter may be anything that is sooner
than the model: the search below, or a smaller model (``draft_model``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

NGRAM_LENGTHS = (4, 3, 2)
"""Longest first: what followed more of the same text is more likely to follow again."""


READ_TOKENS_MAX = 1024
"""In one call: every stream waits for it, about 3 microseconds a token."""


class Drafter(Protocol):
    """One sequence's."""

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most ``count`` tokens that may follow ``tokens``: those of the last call, and more."""
        ...

    def end(self) -> None:
        """Its sequence is gone: free what is held for it."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """One sequence's drafts: arguments of ``Drafter.draft``."""

    drafter: Drafter
    tokens: Sequence[int]
    count: int


class Drafters(Protocol):
    """A worker's, which drafts for many sequences together, and takes time that counts."""

    def begin(self) -> Drafter: ...

    def draft(self, asked: Sequence[Asked]) -> list[list[int]]: ...

    def pass_us(self) -> Callable[[int], float | None]:
        """What one more draft of each of so many sequences takes; None: not known."""
        ...


class PromptLookup:
    """What followed the last few tokens when they stood in the text the last time before.

    A call costs as much as there are new tokens, whatever the length of the text, and a long prompt
    is read over several. There are fewer n-grams of each length than tokens.
    """

    def __init__(self) -> None:
        self._end_of: dict[tuple[int, ...], int] = {}  # of an n-gram's latest place
        self._read_end = 0  # n-grams that end here or before are known

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        self._read(tokens)
        for length in NGRAM_LENGTHS:
            if length <= len(tokens):
                end = self._end_of.get(tuple(tokens[-length:]))
                if end is not None:
                    # What was found may reach into what it was found for: it repeats from there.
                    period = len(tokens) - end
                    return [tokens[end + index % period] for index in range(count)]
        return []

    def end(self) -> None:
        """Nothing is held."""

    def _read(self, tokens: Sequence[int]) -> None:
        # What ends with the last token has nothing after it yet.
        read_end = min(len(tokens) - 1, self._read_end + READ_TOKENS_MAX)
        for end in range(self._read_end + 1, read_end + 1):
            for length in NGRAM_LENGTHS:
                if length <= end:
                    self._end_of[tuple(tokens[end - length : end])] = end
        self._read_end = max(self._read_end, read_end)
