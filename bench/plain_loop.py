"""The least that makes tokens: a model runner stepped in a plain loop.

No hand-off, no scheduler, no prefix cache, no thread, no socket: what a worker's loop is compared
with. Sequences get blocks of their own for good.
"""

from dataclasses import dataclass

from pdserve.engine.blocks import blocks_for
from pdserve.messages import Sampling
from pdserve.model.runner import ModelRunner, Run
from pdserve.model.sampler import SamplerRow, sample

GREEDY = Sampling(temperature=0.0)


@dataclass(slots=True)
class PlainSequence:
    tokens: list[int]
    prompt_tokens: int
    blocks: list[int]

    def row(self) -> SamplerRow:
        generated = len(self.tokens) - self.prompt_tokens
        return SamplerRow(GREEDY, 0, 0, generated, self.tokens, self.prompt_tokens)


class PlainLoop:
    def __init__(self, runner: ModelRunner, *, first_block: int = 0) -> None:
        self.sequences: list[PlainSequence] = []
        self._runner = runner
        self._next_block = first_block

    def add(self, prompt: list[int], *, room_tokens: int) -> PlainSequence:
        """A sequence whose KV is not there yet, with blocks for ``room_tokens``."""
        block_count = blocks_for(room_tokens, self._runner.pool.block_tokens)
        end = self._next_block + block_count
        assert end <= self._runner.pool.block_count, f"{end} blocks are more than the pool has"
        sequence = PlainSequence(prompt, len(prompt), list(range(self._next_block, end)))
        self._next_block = end
        self.sequences.append(sequence)
        return sequence

    def prefill(self, sequence: PlainSequence, chunk_tokens: int) -> None:
        """The prompt in chunks, and the first token."""
        prompt = sequence.tokens
        for start in range(0, len(prompt), chunk_tokens):
            chunk = prompt[start : start + chunk_tokens]
            last = start + len(chunk) == len(prompt)
            logits = self._runner.step([Run(chunk, start, sequence.blocks, wants_logits=last)])
        (token,) = sample(logits, [sequence.row()])
        sequence.tokens.append(token.token)

    def decode(self) -> None:
        """One more token for every sequence."""
        runs = [Run(s.tokens[-1:], len(s.tokens) - 1, s.blocks) for s in self.sequences]
        logits = self._runner.step(runs)
        drawn = sample(logits, [sequence.row() for sequence in self.sequences])
        for sequence, token in zip(self.sequences, drawn, strict=True):
            sequence.tokens.append(token.token)
