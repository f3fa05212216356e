"""The right tokens, through the whole cluster: those of `transformers`, and those of one alone."""

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.integration.harness import Stream, TestCluster, running, settings, stream_tokens
from tests.models.reference import best_tokens, reference_model, write_safetensors
from tests.models.small import write_tokenizer

OUTPUT_TOKENS = 64
LENGTHS = (
    *(1, 2, 15, 16, 17, 31, 33, 64, 100, 127),
    *(128, 129, 200, 256, 300, 400, 512, 700, 1000, 1500),
)


def _prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    """Sentences rather than noise: real prompts have clear favourites among the next tokens."""
    from pdserve.config import ModelConfig
    from pdserve.model.source import locate
    from pdserve.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(locate(ModelConfig()).path)
    words = (
        "The lighthouse keeper counted the ships as they passed and wrote their names in a book. "
        "Every night he lit the lamp, and every morning he put it out again. In winter the sea was "
        "grey and loud; in summer it was blue, and children came to ask how far the light went. "
    ) * 40
    tokens = tokenizer.encode(words)
    assert len(tokens) >= max(lengths)
    return [tokens[index : index + length] for index, length in enumerate(lengths)]


@pytest.mark.parametrize("lengths", [(1, 300), pytest.param(LENGTHS, marks=pytest.mark.slow)])
def test_greedy_tokens_equal_those_of_transformers(
    real_cluster: TestCluster, reference: Any, lengths: tuple[int, ...]
) -> None:
    _assert_as_transformers(real_cluster, reference, lengths)


@pytest.mark.slow
def test_a_safetensors_directory_answers_the_same(default_model: Path, tmp_path: Path) -> None:
    """The real weights in the other format, which ``transformers`` then reads as they are. The
    short test of it is the small model: tests/integration/test_cluster_triton.py."""
    directory = write_safetensors(default_model, tmp_path / "smollm2")
    write_tokenizer(default_model, directory)
    config = settings(
        directory,
        model={"dtype": "float32"},
        prefill={"threads": 2, "pool_blocks": 400, "chunk_tokens": 128},
        decode={"threads": 2, "pool_blocks": 600},
        store={"arena_bytes": 512 << 20},
    )
    with running(config) as cluster:
        _assert_as_transformers(cluster, reference_model(directory, scratch=tmp_path), LENGTHS)


def _assert_as_transformers(cluster: TestCluster, reference: Any, lengths: tuple[int, ...]) -> None:
    prompts = _prompts(lengths)
    fresh = [cluster.tokens(prompt, OUTPUT_TOKENS) for prompt in prompts]
    for prompt, answer in zip(prompts, fresh, strict=True):
        assert len(answer) == OUTPUT_TOKENS
        assert answer == best_tokens(reference, prompt, answer), f"{len(prompt)} tokens"
    reused = [cluster.tokens(prompt, OUTPUT_TOKENS) for prompt in prompts]
    assert reused == fresh, "with the prefix out of the cache"


def test_alone_is_in_company_is_seeded(cluster: TestCluster) -> None:
    """64 streams at once, greedy and seeded with penalties, against each of some alone."""
    chance = random.Random(8)
    prompts = [
        [chance.randrange(20, 40_000) for _ in range(chance.randrange(1, 200))] for _ in range(64)
    ]

    def fields(index: int) -> dict[str, Any]:
        if index % 2 == 0:
            return {"temperature": 0.0}
        return {
            "temperature": 0.9,
            "top_p": 0.95,
            "top_k": 50,
            "seed": index,
            "frequency_penalty": 0.3,
            "repetition_penalty": 1.1,
        }

    async def crowd() -> list[Stream]:
        async with httpx.AsyncClient(
            timeout=300, limits=httpx.Limits(max_connections=64)
        ) as client:
            return await asyncio.gather(
                *(
                    stream_tokens(cluster.url, prompt, 24, client=client, **fields(index))
                    for index, prompt in enumerate(prompts)
                )
            )

    together = asyncio.run(crowd())
    assert [stream.error for stream in together] == [None] * 64
    for index in range(0, 64, 7):
        alone = cluster.tokens(prompts[index], 24, **fields(index))
        assert together[index].tokens == alone, f"stream {index}"


def test_n_choices_share_the_prompt_and_differ_by_choice(cluster: TestCluster) -> None:
    prompt = list(range(500, 700))
    before = cluster.counter("prefill", "prompt_tokens_computed")
    answer = cluster.complete(prompt, n=4, max_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
    texts = [choice["text"] for choice in sorted(answer["choices"], key=lambda c: c["index"])]
    assert len(texts) == 4
    assert len(set(texts)) > 1
    again = cluster.complete(prompt, n=4, max_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
    assert [c["text"] for c in sorted(again["choices"], key=lambda c: c["index"])] == texts
    computed = cluster.counter("prefill", "prompt_tokens_computed") - before
    assert computed <= 200 + 7 * 16, "choices share the prompt's full blocks"


def test_a_beam_search_finds_what_transformers_finds(
    cluster: TestCluster, small_model: Path, tmp_path: Path
) -> None:
    prompt = list(range(700, 745))
    fields = {"use_beam_search": True, "max_tokens": 12, "ignore_eos": True, "logprobs": 0}
    answer = cluster.complete(prompt, n=4, return_token_ids=True, **fields)
    network = reference_model(small_model, scratch=tmp_path)
    wanted = network.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert [choice["token_ids"] for choice in answer["choices"]] == wanted[:, 45:].tolist()
    assert answer["usage"]["completion_tokens"] == 4 * 12
    sums = [sum(choice["logprobs"]["token_logprobs"]) for choice in answer["choices"]]
    assert sums == sorted(sums, reverse=True)
    (best,) = cluster.complete(prompt, best_of=4, **fields)["choices"]
    assert best["text"] == answer["choices"][0]["text"]


def test_best_of_gives_the_likeliest_of_the_choices_that_n_draws(cluster: TestCluster) -> None:
    prompt = list(range(800, 830))
    fields = {"max_tokens": 8, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    drawn = cluster.complete(prompt, n=4, logprobs=0, **fields)["choices"]
    means = [sum(choice["logprobs"]["token_logprobs"]) for choice in drawn]
    ranked = sorted(range(4), key=lambda index: -means[index])
    best = cluster.complete(prompt, n=2, best_of=4, **fields)["choices"]
    assert [choice["text"] for choice in best] == [drawn[index]["text"] for index in ranked[:2]]
