"""What rounding costs a model: how well it foretells a text, with every kind of weights and of KV.

    python -m bench.perplexity [--json FILE] [--quick] [--text FILE]

*Perplexity* is e to the mean surprise: among how many equally likely tokens the model seems to
choose. The real model reads a text (``texts/README.md``), each token with all before it, in chunks,
so that keys and values are read back from the pool. Weights stand beside float32, KV of 8 bits
beside KV of bfloat16 with the same weights; so does a prefix whose blocks were packed for a store
(``pdserve.model.store_codec``). fp8 is computed by the torch path, since a CPU's
kernels do not read it; its codes are those of a GPU (``pdserve.model.kv_codec``).

How much worse it gets moves by some tenths of a percent with the text, both ways: roundings are
noise, and where two tokens are about as likely noise may help. So the spread is an interval, in
which 95 % of what is bootstrapped from stretches of the text lies. ``--quick`` reads the text's
first third, which says less.
"""

import argparse
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.divergence import runner_with
from bench.frame import ROOT, Options, Row, at_most, row, run
from pdserve.config import ModelConfig
from pdserve.model.load import load_runner
from pdserve.model.runner import ModelRunner, Run
from pdserve.model.source import locate
from pdserve.model.store_codec import BlockCodec
from pdserve.model.torch_ops import TorchOps
from pdserve.text.tokenizer import load_tokenizer

TEXT = ROOT / "bench/texts/the_time_machine.txt"
CHUNK_TOKENS = 128
STRETCH_TOKENS = 32
"""What is drawn at a time in bootstrapping: neighbouring tokens share what surprises."""

DRAWS = 2000
WEIGHTS: dict[str, dict[str, Any]] = {
    "bfloat16": {"quantization": "none"},
    "as the file has them": {"quantization": "file"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
}
BAR = at_most(0.5)


def surprises(
    runner: ModelRunner, tokens: Sequence[int], codec: BlockCodec | None = None
) -> Tensor:
    """Of each token but the first, given all before it, in nats: [tokens - 1] float64.

    ``codec``: each chunk finds what is before it as if it came from a store that packs blocks so.
    """
    blocks = range(blocks_for(len(tokens), runner))
    parts = []
    for start in range(0, len(tokens) - 1, CHUNK_TOKENS):
        end = min(start + CHUNK_TOKENS, len(tokens) - 1)
        # Drafts are tokens whose logits are wanted too.
        chunk = Run(tokens[start:end], start, blocks, draft_count=end - start - 1)
        logprobs_NV = runner.step([chunk]).double().log_softmax(-1)
        expected_N1 = torch.tensor(tokens[start + 1 : end + 1])[:, None]
        parts.append(-logprobs_NV.gather(1, expected_N1)[:, 0])
        if codec is not None:
            by_way_of_a_store(runner, codec, blocks[start // codec.block_tokens :], end - start)
    return torch.cat(parts)


def by_way_of_a_store(
    runner: ModelRunner, codec: BlockCodec, blocks: Sequence[int], token_count: int
) -> None:
    plain = memoryview(bytearray(codec.plain_bytes))
    packed = memoryview(bytearray(codec.packed_bytes))
    for block in blocks[: token_count // codec.block_tokens]:  # those that are full
        runner.pool.read_block(block, plain)
        codec.pack(plain, packed)
        codec.unpack(packed, plain)
        runner.pool.write_block(block, plain)


def blocks_for(token_count: int, runner: ModelRunner) -> int:
    return -(-token_count // runner.pool.block_tokens)  # rounded up


def perplexity(surprises_N: Tensor) -> float:
    return float(surprises_N.mean().exp())


def worse_percent(difference_N: Tensor) -> float:
    """By how much perplexity grows where surprises do by so much."""
    return 100 * float(difference_N.mean().expm1())


def compared(name: str, surprises_N: Tensor, reference: str, reference_N: Tensor) -> Row:
    difference_N = surprises_N - reference_N
    filled = row(name, [worse_percent(difference_N)], "% worse", reference=reference, bar=BAR)
    return dataclasses.replace(
        filled, reference_value=perplexity(reference_N), spread=interval(difference_N)
    )


def interval(difference_N: Tensor) -> tuple[float, float]:
    """Of ``worse_percent``, of texts drawn from stretches of this one."""
    whole = len(difference_N) // STRETCH_TOKENS * STRETCH_TOKENS
    means_S = difference_N[:whole].reshape(-1, STRETCH_TOKENS).mean(1)
    generator = torch.Generator().manual_seed(0)
    drawn_DS = torch.randint(len(means_S), (DRAWS, len(means_S)), generator=generator)
    worse_D = 100 * means_S[drawn_DS].mean(1).expm1()
    low, high = worse_D.quantile(torch.tensor([0.025, 0.975], dtype=worse_D.dtype)).tolist()
    return low, high


def measure(options: Options) -> Iterator[Row]:
    text = options.arguments.text.read_text()
    tokens = load_tokenizer(locate(ModelConfig()).path).encode(text)
    tokens = tokens[: len(tokens) // 3] if options.quick else tokens

    @functools.cache
    def of_config(**changes: Any) -> Tensor:
        config = ModelConfig(device="cpu", kernels="cpu", **changes)
        block_count = len(tokens) // config.block_tokens + 1
        return surprises(load_runner(config, block_count=block_count, pool_bytes=0), tokens)

    def of_torch(kv_dtype: torch.dtype | None = None) -> Tensor:
        config = ModelConfig(device="cpu", kernels="cpu", dtype="bfloat16")
        block_count = len(tokens) // config.block_tokens + 1
        return surprises(runner_with(TorchOps(), config, block_count, kv_dtype), tokens)

    def packed(code: torch.dtype) -> Tensor:
        config = ModelConfig(device="cpu", kernels="cpu", **WEIGHTS["bfloat16"])
        block_count = len(tokens) // config.block_tokens + 1
        runner = load_runner(config, block_count=block_count, pool_bytes=0)
        shape = runner.architecture
        codec = BlockCodec(
            shape.layer_count,
            shape.kv_head_count,
            config.block_tokens,
            shape.head_dim,
            runner.pool.tensor.dtype,
            code,
        )
        return surprises(runner, tokens, codec)

    exact_N = of_config(dtype="float32", quantization="none")
    for name, changes in WEIGHTS.items():
        yield compared(f"weights: {name}", of_config(**changes), "float32", exact_N)
    plain = WEIGHTS["bfloat16"]
    coded_N = of_config(kv_dtype="int8", **plain)
    yield compared("KV: int8", coded_N, "KV: bfloat16", of_config(**plain))
    coded_N = of_config(dtype="float32", quantization="none", kv_dtype="int8")
    yield compared("KV: int8, all else float32", coded_N, "float32", exact_N)
    coded_N = of_torch(torch.float8_e4m3fn)
    yield compared("KV: fp8, by the torch path", coded_N, "KV: bfloat16, likewise", of_torch())
    for code, name in ((torch.int8, "int8"), (torch.float8_e4m3fn, "fp8")):
        yield compared(f"prefix packed: {name}", packed(code), "KV: bfloat16", of_config(**plain))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, default=TEXT, help="another text to read")


if __name__ == "__main__":
    run("perplexity", measure, add_arguments=add_arguments)
