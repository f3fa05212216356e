"""64 texts, written together and resumed three times each, are those that each writes alone.

What ``test_identity`` shows for single steps, here with everything that makes a text: prompts in
chunks, a sampler with seeds and penalties, and at three random places a move to another pool, into
other blocks, as a parked request moves to another worker. No pool starts empty: its blocks hold
what somebody else has left there.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from pdserve.messages import Sampling
from pdserve.model.runner import ModelRunner, Run
from pdserve.model.sampler import SamplerRow, sample
from tests.models.small import write_small_model
from tests.unit.model.conftest import RunnerOf

TEXTS = 64
NEW_TOKENS = 12
MOVES = 3
PROMPT_TOKENS_MAX = 80
BLOCK_TOKENS = 16
BLOCKS_EACH = -(-(PROMPT_TOKENS_MAX + NEW_TOKENS) // BLOCK_TOKENS)
GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(
    temperature=0.9, top_p=0.95, top_k=50, frequency_penalty=0.3, repetition_penalty=1.1
)


@dataclass
class Text:
    index: int
    prompt: list[int]
    blocks: list[int]
    tokens: list[int] = field(default_factory=list)  # prompt and output
    logits: list[torch.Tensor] = field(default_factory=list)  # one row per token of output
    computed: int = 0  # tokens that have KV
    home: int = 0
    moves: list[int] = field(default_factory=list)  # values of ``computed`` at which it moves

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def finished(self) -> bool:
        return len(self.logits) == NEW_TOKENS

    def run(self, length: int) -> Run:
        end = min(self.computed + length, *self.moves[:1], len(self.tokens))
        stretch = self.tokens[self.computed : end]
        return Run(stretch, self.computed, self.blocks, wants_logits=end == len(self.tokens))

    def take(self, run: Run, logits_V: torch.Tensor | None) -> None:
        self.computed += len(run.tokens)
        if logits_V is not None:
            self.logits.append(logits_V)
            self.tokens.append(sample(logits_V[None], [self._row()])[0].token)

    def _row(self) -> SamplerRow:
        return SamplerRow(
            sampling=GREEDY if self.index % 2 == 0 else DRAWN,
            seed=self.index,
            choice=0,
            index=len(self.logits) - 1,
            tokens=self.tokens,
            prompt_tokens=len(self.prompt),
        )


def step(runner: ModelRunner, texts: list[Text], runs: list[Run]) -> None:
    rows = iter(runner.step(runs))
    for text, run in zip(texts, runs, strict=True):
        text.take(run, next(rows) if run.wants_logits else None)


def written_alone(runner: ModelRunner, text: Text) -> Text:
    while not text.finished:
        step(runner, [text], [text.run(len(text.tokens))])
    return text


def move(text: Text, runners: list[ModelRunner], free: list[list[int]]) -> None:
    source, text.home = text.home, 1 - text.home
    old, text.blocks = text.blocks, [free[text.home].pop() for _ in text.blocks]
    content = bytearray(runners[source].pool.block_bytes)
    for before, after in zip(old, text.blocks, strict=True):
        runners[source].pool.read_block(before, memoryview(content))
        runners[text.home].pool.write_block(after, memoryview(content))
    free[source] += old


def write_together(runners: list[ModelRunner], texts: list[Text], chance: random.Random) -> None:
    for runner in runners:
        runner.pool.tensor.normal_()
    free: list[list[int]] = [
        [],
        chance.sample(range(runners[1].pool.block_count), TEXTS * BLOCKS_EACH),
    ]
    while waiting := [text for text in texts if not text.finished]:
        for text in waiting:
            if text.moves[:1] == [text.computed]:
                text.moves.pop(0)
                move(text, runners, free)
        for home, runner in enumerate(runners):
            here = [text for text in waiting if text.home == home and chance.random() < 0.9]
            runs = [text.run(chance.choice([1, 3, 16, 31, PROMPT_TOKENS_MAX])) for text in here]
            if runs:
                step(runner, here, runs)
    assert not any(text.moves for text in texts), "every text moved three times"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_64_texts_together_are_each_alone(
    tmp_path: Path, runner_of: RunnerOf, dtype: torch.dtype
) -> None:
    directory = write_small_model(tmp_path, hidden=192, heads=3, kv_heads=1, ffn=512)
    block_count = TEXTS * BLOCKS_EACH
    runners = [runner_of(directory, dtype=dtype, block_count=block_count) for _ in range(2)]
    chance = random.Random(64)
    places = list(range(block_count))
    chance.shuffle(places)
    together, alone = [], []
    for index in range(TEXTS):
        prompt = [chance.randrange(512) for _ in range(chance.randint(1, PROMPT_TOKENS_MAX))]
        blocks = [places.pop() for _ in range(BLOCKS_EACH)]
        alone.append(written_alone(runners[0], Text(index, prompt, blocks)))
        moves = sorted(chance.sample(range(1, len(prompt) + NEW_TOKENS - 1), MOVES))
        together.append(Text(index, prompt, blocks, moves=moves))

    write_together(runners, together, chance)

    for text, expected in zip(together, alone, strict=True):
        assert text.tokens == expected.tokens, text.index
        assert torch.equal(torch.stack(text.logits), torch.stack(expected.logits)), text.index
    assert len({tuple(text.tokens[-NEW_TOKENS:]) for text in alone}) > TEXTS // 2
