"""Where a stop string ends a stream of text.

The stream ends at the first character with which some stop string is complete; of several that
end there the longest counts. This is what a reader would find who looks after every character, so
it does not depend on how the stream was cut into pushes.

Text is shown as soon as it cannot become part of a stop string: kept back is the longest suffix
that is the beginning of one, fewer characters than the longest stop string has.
"""

import copy
from collections.abc import Sequence


class StopStrings:
    """One stream and the strings that end it."""

    def __init__(self, strings: Sequence[str]) -> None:
        assert all(strings), f"an empty stop string would end every answer: {strings!r}"
        self._strings = tuple(strings)
        self._first_characters = frozenset(string[0] for string in strings)
        self._held_max = max(map(len, strings), default=1) - 1
        self._held = ""
        self._ended = False

    def fork(self) -> "StopStrings":
        """A stream of its own that has had the same text."""
        return copy.copy(self)  # it holds nothing that changes

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string that was hit, if any.

        Text before the stop string is shown, itself and what follows it never. After a hit the
        stream is over and must not be pushed to.
        """
        assert not self._ended, "a stop string was hit: the stream is over"
        if not self._strings:  # as of most streams, at every token
            return text, None
        text = self._held + text
        hit = self._first_hit(text)
        if hit is not None:
            start, stop = hit
            self._held = ""
            self._ended = True
            return text[:start], stop
        settled = self._settled_length(text)
        self._held = text[settled:]
        return text[:settled], None

    def flush(self) -> str:
        """What was kept back and, now that no more comes, is no stop string."""
        held, self._held = self._held, ""
        return held

    def _first_hit(self, text: str) -> tuple[int, str] | None:
        """(start, stop string) of the hit with the lowest end, then the lowest start."""
        hits = ((text.find(stop), stop) for stop in self._strings)
        return min(
            ((start, stop) for start, stop in hits if start >= 0),
            key=lambda hit: (hit[0] + len(hit[1]), hit[0]),
            default=None,
        )

    def _settled_length(self, text: str) -> int:
        for start in range(max(0, len(text) - self._held_max), len(text)):
            if text[start] in self._first_characters and any(
                stop.startswith(text[start:]) for stop in self._strings
            ):
                return start
        return len(text)
