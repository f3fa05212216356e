"""A step's tokens are handed out a few at a time, so that nobody has to stand behind all of them.

A decode worker's step comes as one frame with something for each of its streams. Handed out at
once, it would wake every stream's task in one turn of the event loop, and a request's first token,
which another worker sends, would wait until the last of them had written. First tokens go ahead:
nothing of their request can be waiting. Others keep the order in which they came.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from pdserve.messages import TokenDelta

DELTAS_PER_TURN: Final = 8

TURNS_MAX: Final = 8
"""What waits is handed out within about so many turns: it does not grow when there is too much."""


class Turns:
    def __init__(self, hand: Callable[[TokenDelta], None]) -> None:
        self._hand = hand
        self._waiting: deque[TokenDelta] = deque()

    def add(self, deltas: Sequence[TokenDelta]) -> None:
        is_first = not self._waiting
        for delta in deltas:
            if delta.offset == 0:
                self._hand(delta)
            else:
                self._waiting.append(delta)
        if is_first:
            self._turn()

    def _turn(self) -> None:
        waiting = self._waiting
        count = min(len(waiting), max(DELTAS_PER_TURN, len(waiting) // TURNS_MAX))
        if len(waiting) > count:
            asyncio.get_running_loop().call_soon(self._turn)
        for _ in range(count):
            self._hand(waiting.popleft())
