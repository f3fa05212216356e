"""What a model thinks, apart from what it answers. Pure, and incremental.

Reasoning models write ``<think>…</think>`` before their answer, and differ in what they leave out:

    deepseek_r1   thinks from the first character on; its chat template may have written ``<think>``
                  already. An answer without ``</think>`` is all thought.
    qwen3         thinks where it says ``<think>``. An answer without it is no thought.

Only the first thought counts: behind ``</think>`` all is answer, tags too. The tags themselves are
in neither part, every other character is in one of them, in order. The parts do not depend on how
the stream was cut into pushes: kept back is the longest suffix that may become a tag that is
looked for, so fewer characters than that tag has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from pdserve.config import ReasoningStyle

OPEN, CLOSE = "<think>", "</think>"


class Place(StrEnum):
    """Where in its text a model is."""

    MAY_THINK = "may_think"  # no tag yet: an answer unless one comes
    THINKS_UNOPENED = "thinks_unopened"  # no tag yet: a thought all the same
    THINKS = "thinks"
    ANSWERS = "answers"


TAGS: Mapping[Place, Mapping[str, Place]] = MappingProxyType(
    {
        Place.MAY_THINK: {OPEN: Place.THINKS},
        Place.THINKS_UNOPENED: {OPEN: Place.THINKS, CLOSE: Place.ANSWERS},
        Place.THINKS: {CLOSE: Place.ANSWERS},
        Place.ANSWERS: {},
    }
)
"""The tags looked for in each place, and where they lead."""

THOUGHTS = frozenset({Place.THINKS_UNOPENED, Place.THINKS})

FIRST: Mapping[ReasoningStyle, Place] = MappingProxyType(
    {"deepseek_r1": Place.THINKS_UNOPENED, "qwen3": Place.MAY_THINK}
)


@dataclass(frozen=True, slots=True)
class Parts:
    reasoning: str = ""
    content: str = ""

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(self.reasoning + other.reasoning, self.content + other.content)


class ReasoningParser:
    """One answer's text, as it arrives."""

    def __init__(self, style: ReasoningStyle) -> None:
        self._place = FIRST[style]
        self._held = ""

    def push(self, text: str) -> Parts:
        """What is settled now."""
        text = self._held + text
        parts = Parts()
        while (hit := self._first_tag(text)) is not None:
            start, tag = hit
            parts += self._part(text[:start])
            self._place = TAGS[self._place][tag]
            text = text[start + len(tag) :]
        settled = self._settled_length(text)
        self._held = text[settled:]
        return parts + self._part(text[:settled])

    def flush(self) -> Parts:
        """What was kept back and, now that no more comes, is no tag."""
        held, self._held = self._held, ""
        return self._part(held)

    def _part(self, text: str) -> Parts:
        return Parts(reasoning=text) if self._place in THOUGHTS else Parts(content=text)

    def _first_tag(self, text: str) -> tuple[int, str] | None:
        hits = ((text.find(tag), tag) for tag in TAGS[self._place])
        return min((hit for hit in hits if hit[0] >= 0), default=None)

    def _settled_length(self, text: str) -> int:
        held = (
            length
            for tag in TAGS[self._place]
            for length in range(1, len(tag))
            if text.endswith(tag[:length])
        )
        return len(text) - max(held, default=0)
