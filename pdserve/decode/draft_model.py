"""Drafts by a second, smaller model: it says greedily what it would say next.

    text so far ──► read what is new ──► draft 1 ──► draft 2 ──► …
                    one pass             one pass    one pass     of all streams together

The model reads the same tokens as the large one, so both have one tokeniser; it has weights, a pool
of KV blocks and a context of its own. Per stream it keeps the blocks of what it has read, drafts
included: those that turned out to be true are not read again, the first that did not and all behind
it are written over. Nothing of a stream outlives its worker: one that is resumed elsewhere is read
there from its beginning.

Bounds: a call reads at most ``READ_TOKENS_MAX`` tokens of all texts together, a longer prompt is
read over several, and its stream has no drafts before the end of that. A stream that finds no
block, or has reached the context of the small model, has none either.

Whatever it says costs rows of a step and never a token (``drafting``). That it costs time as well,
``drafting_cost`` weighs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pdserve.clock import US, Clock
from pdserve.decode.drafting import Asked, Drafter
from pdserve.decode.speculation import StepTimes
from pdserve.engine.blocks import blocks_for
from pdserve.engine.runner import Runner
from pdserve.model.runner import Run

READ_TOKENS_MAX = 256
"""In one call, of all texts: every stream waits for it."""


@dataclass(slots=True, eq=False)
class DraftedText:
    """What the small model knows of one stream."""

    model: "DraftModel"
    known: int = 0
    """Tokens whose keys and values lie in ``blocks``."""

    guesses: list[int] = field(default_factory=list)
    """The last of them, which were drafts when they were read."""

    blocks: list[int] = field(default_factory=list)

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        return self.model.draft([Asked(self, tokens, count)])[0]

    def end(self) -> None:
        self.model.free(self)

    def settle(self, tokens: Sequence[int]) -> None:
        """Keep the guesses that came true, and leave the last token to be read: its logits are
        asked for."""
        true = self.known - len(self.guesses)
        for guess in self.guesses:
            if true >= len(tokens) - 1 or tokens[true] != guess:
                break
            true += 1
        self.known, self.guesses = min(true, len(tokens) - 1), []


@dataclass(slots=True)
class _Writing:
    """One stream's part of a call."""

    text: DraftedText
    unread: Sequence[int]
    count: int
    is_read: bool  # to its end, with this call
    drafts: list[int]

    def run(self, *, wants_logits: bool) -> Run:
        return Run(
            tokens=self.unread,
            start=self.text.known,
            blocks=self.text.blocks,
            wants_logits=wants_logits,
        )


class DraftModel:
    """One worker's."""

    def __init__(self, runner: Runner, *, vocab_size: int, clock: Clock) -> None:
        """``vocab_size``: the large model's; a smaller one may pad its own further."""
        self._runner = runner
        self._vocab_size = vocab_size
        self._clock = clock
        self._times = StepTimes()
        self._free_blocks = list(range(runner.pool.block_count))

    @property
    def free_count(self) -> int:
        """Blocks that no stream has."""
        return len(self._free_blocks)

    def begin(self) -> Drafter:
        return DraftedText(self)

    def free(self, text: DraftedText) -> None:
        self._free_blocks += text.blocks
        text.blocks, text.known, text.guesses = [], 0, []

    def pass_us(self) -> Callable[[int], float | None]:
        """What a pass over one token of each of so many streams takes; None: not measured."""
        return self._times.estimate()

    def draft(self, asked: Sequence[Asked]) -> list[list[int]]:
        """At most ``count`` drafts for each of ``asked``, whose drafters are this model's."""
        drafts: list[list[int]] = [[] for _ in asked]
        writing = list(self._begun(asked, drafts))
        if writing:
            self._pass(writing, [one.is_read for one in writing])
        while going := [one for one in writing if one.is_read and len(one.drafts) < one.count]:
            for one in going:
                one.unread = one.drafts[-1:]
                one.text.guesses += one.unread
            self._pass(going, [True] * len(going))
        return drafts

    def _begun(self, asked: Sequence[Asked], drafts: list[list[int]]) -> list[_Writing]:
        spare = READ_TOKENS_MAX
        writing: list[_Writing] = []
        for one, said in zip(asked, drafts, strict=True):
            text = one.drafter
            assert isinstance(text, DraftedText)
            # The last draft is never read itself.
            room = self._runner.architecture.context_tokens - len(one.tokens) + 1
            count = min(one.count, room)
            if count < 1 or spare < 1:
                continue
            text.settle(one.tokens)
            end = min(len(one.tokens), text.known + spare)
            is_read = end == len(one.tokens)
            if not self._has_room(text, end + (count - 1 if is_read else 0)):
                continue
            unread = one.tokens[text.known : end]
            spare -= len(unread)
            writing.append(_Writing(text, unread, count, is_read, said))
        return writing

    def _has_room(self, text: DraftedText, token_count: int) -> bool:
        missing = blocks_for(token_count, self._runner.pool.block_tokens) - len(text.blocks)
        if missing > len(self._free_blocks):
            return False
        for _ in range(missing):
            text.blocks.append(self._free_blocks.pop())
        return True

    def _pass(self, writing: Sequence[_Writing], wants: Sequence[bool]) -> None:
        began_ns = self._clock()
        logits_RV = self._runner.step(
            [one.run(wants_logits=wanted) for one, wanted in zip(writing, wants, strict=True)]
        )
        best = logits_RV[:, : self._vocab_size].argmax(dim=-1).tolist()
        rows = sum(len(one.unread) for one in writing)
        self._times.measured(rows, (self._clock() - began_ns) // US)
        for one in writing:
            one.text.known += len(one.unread)
        said = [one for one, wanted in zip(writing, wants, strict=True) if wanted]
        for one, token in zip(said, best, strict=True):
            one.drafts.append(token)
