"""What our own runner and sampler write for some prompts with no cluster around them.

The yardstick for streams too long, or drawn in a way too particular, to ask ``transformers`` for;
``tests/integration/test_smollm2_reference.py`` ties the two together.
"""

from collections.abc import Sequence
from pathlib import Path

from bench.divergence import texts_of, write
from pdserve.config import ModelConfig
from pdserve.messages import Sampling
from pdserve.model.load import load_runner


def tokens_alone(
    model: Path, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], count: int
) -> list[list[int]]:
    """``count`` tokens after each prompt, in float32. The index of a prompt is its seed; an end of
    text does not end it."""
    texts = texts_of(prompts, samplings, count)
    config = ModelConfig(source=str(model), dtype="float32")
    runner = load_runner(config, block_count=texts[-1].blocks.stop, pool_bytes=0, threads=1)
    write(runner, texts, chunk_tokens=256, new_tokens=count)
    return [text.output for text in texts]
