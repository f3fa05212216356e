"""Adapters through the whole cluster: the merged models' tokens, each from blocks of its own."""

import asyncio
from pathlib import Path

import httpx

from tests.integration.harness import Stream, TestCluster, random_prompts, stream_tokens
from tests.models.adapter import merged
from tests.models.reference import reference_tokens

OUTPUT_TOKENS = 12


def test_each_model_answers_as_its_merged_weights_do_with_blocks_of_its_own(
    cluster: TestCluster, small_model: Path, small_adapters: dict[str, Path], tmp_path: Path
) -> None:
    """All at once, the same prompts for everybody; then again, out of the store."""
    weights = {"small": small_model} | {
        name: merged(small_model, path, tmp_path / name) for name, path in small_adapters.items()
    }
    prompts = [
        prompt[:length]
        for prompt, length in zip(
            random_prompts(3, seed=71, length=200), (12, 70, 200), strict=True
        )
    ]

    async def ask() -> list[Stream]:
        async with httpx.AsyncClient(timeout=300) as client:
            return await asyncio.gather(
                *(
                    stream_tokens(cluster.url, prompt, OUTPUT_TOKENS, client=client, model=name)
                    for name in weights
                    for prompt in prompts
                )
            )

    first, again = asyncio.run(ask()), asyncio.run(ask())

    expected = [
        tokens
        for path in weights.values()
        for tokens in reference_tokens(path, prompts, OUTPUT_TOKENS, scratch=tmp_path)
    ]
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    assert [stream.tokens for stream in first] == expected
    assert [stream.tokens for stream in again] == expected
    assert [stream.cached_tokens for stream in first] == [0] * len(expected)
    assert [stream.cached_tokens for stream in again] == [0, 64, 192] * len(weights)
