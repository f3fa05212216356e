"""Speculation with drafts that a second model writes, as far as its time pays."""

from collections.abc import Sequence

from pdserve.decode.drafting import Asked, Drafters
from pdserve.decode.drafting_cost import Tries, depth_that_pays
from pdserve.decode.speculation import Chance, Drafting, Speculation


class ModelSpeculation(Speculation):
    """One worker's. A new stream's chance is the worker's of late: what a model is good at is the
    same for most texts, and every stream's own is soon known."""

    def __init__(self, drafters: Drafters, draft_tokens_max: int) -> None:
        super().__init__(drafters.begin, draft_tokens_max)
        self._drafters = drafters
        self._usual = Chance()
        self._tries = Tries()

    def begin(self) -> Drafting:
        return Drafting(self._drafters.begin(), Chance(self._usual.value))

    def came(self, drafting: Drafting, tokens: Sequence[int]) -> None:
        for token, draft in zip(tokens, drafting.offered, strict=False):
            self._usual.saw(held=token == draft)
        super().came(drafting, tokens)

    def _offer(
        self, texts: Sequence[tuple[Drafting, Sequence[int]]], limits: Sequence[int]
    ) -> None:
        paying = depth_that_pays(
            [drafting.chance.value for drafting, _ in texts],
            limits,
            self._times.estimate(),
            self._drafters.pass_us(),
        )
        depth = self._tries.depth(paying)
        asked = [
            Asked(drafting.drafter, tokens, min(limit, depth))
            for (drafting, tokens), limit in zip(texts, limits, strict=True)
        ]
        written = self._drafters.draft(asked) if depth else [[] for _ in asked]
        for (drafting, _), drafts in zip(texts, written, strict=True):
            drafting.offered = drafts
