"""How many streams become other texts because of the company they are computed in.

    python -m bench.divergence [--json FILE] [--quick]

Every text is written twice with the real model: alone, its prompt in one go and then token by
token; and together with all others, prompts in chunks that share steps with decoded tokens. A
stream differs when any of its tokens does. Three ways to compute:

* as ``model.deterministic`` says by default: no stream may differ;
* with ``model.deterministic=false``, which lets a path round a row by the shape of its batch where
  that is faster (today: Triton's attention over long runs; the CPU path has no faster way that it
  could take, and stays at 0);
* with torch as it comes, the reference: the same weights through ``functional.linear`` and
  ``scaled_dot_product_attention``, and nothing that holds a row's bits. What the promise is worth.

A greedy stream differs once two logits were closer than the rounding; a drawn one once a number
fell between two roundings of a sum.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from bench.frame import Options, Row, at_most, row, run
from pdserve.config import ModelConfig
from pdserve.engine.blocks import blocks_for
from pdserve.messages import Sampling
from pdserve.model.families.registry import read_architecture
from pdserve.model.gguf_weights import GgufWeights
from pdserve.model.load import device_of, load_runner
from pdserve.model.ops import BatchLayout, LinearWeight
from pdserve.model.pool import KvPool
from pdserve.model.runner import ModelRunner, Run
from pdserve.model.safetensors_weights import SafetensorsWeights
from pdserve.model.sampler import SamplerRow, sample
from pdserve.model.source import locate
from pdserve.model.torch_ops import TorchOps
from pdserve.model.weights import WeightFiles, build_weights
from pdserve.text.tokenizer import load_tokenizer

TEXTS = 64
TEXTS_QUICK = 16
NEW_TOKENS = 32
PROMPT_TOKENS_MAX = 200
CHUNK_TOKENS = 64
BLOCK_TOKENS = 16
TENSORS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SAMPLINGS = {
    "greedy": Sampling(temperature=0.0),
    "seeded": Sampling(temperature=0.8, top_p=0.95, top_k=50),
}
WORDS = (
    "The ferry left at six, and by seven the island was a grey line behind the rain. Nobody spoke "
    "much. A man with two dogs asked whether the bridge would ever be built; the engineer laughed, "
    "drew three arches on the back of her ticket, and wrote a price under each of them. "
) * 12


class Steps(Protocol):
    """What is needed of a ``ModelRunner``."""

    def step(self, runs: Sequence[Run]) -> Tensor: ...


@dataclass(slots=True)
class Text:
    """One stream while it is written."""

    seed: int
    prompt: tuple[int, ...]
    sampling: Sampling
    blocks: range
    tokens: list[int] = field(default_factory=list)  # prompt and output
    computed: int = 0  # tokens that have KV

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    def run(self, chunk_tokens: int) -> Run:
        end = min(self.computed + chunk_tokens, len(self.tokens))
        stretch = self.tokens[self.computed : end]
        return Run(stretch, self.computed, self.blocks, wants_logits=end == len(self.tokens))

    def row(self) -> SamplerRow:
        return SamplerRow(
            sampling=self.sampling,
            seed=self.seed,
            choice=0,
            index=len(self.output),
            tokens=self.tokens,
            prompt_tokens=len(self.prompt),
        )


def texts_of(
    prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], new_tokens: int
) -> list[Text]:
    """A text's seed is its index; the first blocks of the pool are the first text's, and so on."""
    texts, first = [], 0
    for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        end = first + blocks_for(len(prompt) + new_tokens, BLOCK_TOKENS)
        texts.append(Text(index, tuple(prompt), sampling, range(first, end)))
        first = end
    return texts


def write(runner: Steps, texts: Sequence[Text], *, chunk_tokens: int, new_tokens: int) -> None:
    """All of them in the same steps, to the ends of all."""
    while waiting := [text for text in texts if len(text.output) < new_tokens]:
        runs = [text.run(chunk_tokens) for text in waiting]
        logits = runner.step(runs)
        for text, stretch in zip(waiting, runs, strict=True):
            text.computed += len(stretch.tokens)
        drawing = [
            text for text, stretch in zip(waiting, runs, strict=True) if stretch.wants_logits
        ]
        if drawing:
            drawn = sample(logits, [text.row() for text in drawing])
            for text, token in zip(drawing, drawn, strict=True):
                text.tokens.append(token.token)


def share_that_differs(
    runner: Steps, prompts: Sequence[Sequence[int]], sampling: Sampling, new_tokens: int
) -> float:
    """Per cent of the streams that company changes."""

    samplings = [sampling] * len(prompts)
    alone, together = (texts_of(prompts, samplings, new_tokens) for _ in range(2))
    for text in alone:
        write(runner, [text], chunk_tokens=PROMPT_TOKENS_MAX, new_tokens=new_tokens)
    write(runner, together, chunk_tokens=CHUNK_TOKENS, new_tokens=new_tokens)
    differ = sum(a.output != b.output for a, b in zip(alone, together, strict=True))
    return 100 * differ / len(prompts)


class TorchAsItComes(TorchOps):
    """Matrices and attention in whatever shape the batch happens to have."""

    name = "torch as it comes"

    def pack(self, weight: LinearWeight) -> LinearWeight:
        return weight

    def linear(self, x_NC: Tensor, weight: LinearWeight) -> Tensor:
        return functional.linear(x_NC, weight.weight_OC, weight.bias_O)

    def attention(
        self,
        q_NHD: Tensor,
        batch: BatchLayout,
        pool_PL2GTD: Tensor,
        layer: int,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        out_NHD = torch.empty_like(q_NHD)
        starts = batch.starts_R1.tolist()
        for index, context in enumerate(batch.contexts_R.tolist()):
            begin, end = starts[index], starts[index + 1]
            blocks = batch.tables_RB[index, : blocks_for(context, BLOCK_TOKENS)].long()
            keys_GKD, values_GKD = (
                pool_PL2GTD[blocks, layer, part].transpose(0, 1).flatten(1, 2)[:, :context]
                for part in (0, 1)
            )
            places_K = torch.arange(context, device=q_NHD.device)
            before_QK = batch.positions_N[begin:end, None] - places_K
            out_HQD = functional.scaled_dot_product_attention(
                q_NHD[begin:end].transpose(0, 1),
                keys_GKD,
                values_GKD,
                attn_mask=(before_QK >= 0) & (before_QK < (window or context)),
                scale=scale,
                enable_gqa=True,
            )
            out_NHD[begin:end] = out_HQD.transpose(0, 1)
        return out_NHD


def runner_with(
    ops: TorchOps, config: ModelConfig, block_count: int, kv_dtype: torch.dtype | None = None
) -> ModelRunner:
    """As ``load_runner`` makes it, with operations, and a pool, of our own choice."""
    files = locate(config)
    architecture = read_architecture(files)
    device, dtype = device_of(config), TENSORS[config.dtype]
    stored: WeightFiles = (
        GgufWeights(files.path, architecture)
        if files.format == "gguf"
        else SafetensorsWeights(files.path)
    )
    weights = build_weights(architecture, stored, ops, dtype=dtype, device=device)
    pool = KvPool(
        architecture,
        block_count=block_count,
        block_tokens=BLOCK_TOKENS,
        dtype=kv_dtype or dtype,
        device=device,
    )
    return ModelRunner(architecture, weights, ops, pool)


def prompts_of(count: int) -> list[list[int]]:
    """Sentences, not noise: real texts have clear favourites among the next tokens."""
    tokens = load_tokenizer(locate(ModelConfig()).path).encode(WORDS)
    chance = random.Random(count)
    starts = [chance.randrange(len(tokens) - PROMPT_TOKENS_MAX) for _ in range(count)]
    return [tokens[start : start + chance.randint(1, PROMPT_TOKENS_MAX)] for start in starts]


def measure(options: Options) -> Iterator[Row]:
    prompts = prompts_of(TEXTS_QUICK if options.quick else TEXTS)
    block_count = len(prompts) * blocks_for(PROMPT_TOKENS_MAX + NEW_TOKENS, BLOCK_TOKENS)
    for dtype in TENSORS:
        config = ModelConfig(dtype=dtype, block_tokens=BLOCK_TOKENS)  # type: ignore[arg-type]
        free = dataclasses.replace(config, deterministic=False)
        held, unheld = (
            load_runner(each, block_count=block_count, pool_bytes=0) for each in (config, free)
        )
        plain = runner_with(TorchAsItComes(), config, block_count)
        for name, sampling in SAMPLINGS.items():
            by_held, by_unheld, by_plain = (
                share_that_differs(runner, prompts, sampling, NEW_TOKENS)
                for runner in (held, unheld, plain)
            )
            for way, value, bar in (
                ("deterministic", by_held, at_most(0.0)),
                ("deterministic=false", by_unheld, None),
            ):
                yield row(
                    f"{dtype}, {name}, {way}",
                    [value],
                    "% differ",
                    reference="torch as it comes",
                    reference_samples=[by_plain],
                    bar=bar,
                )


if __name__ == "__main__":
    run("divergence", measure)
