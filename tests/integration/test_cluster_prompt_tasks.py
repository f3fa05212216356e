"""Embeddings and the scores of prompts through a cluster of Ray: two questions of each kind at
once, the numbers of `transformers`, and nothing left behind. In detail: ``test_prompt_tasks``."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.integration.harness import WAIT_S, TestCluster, held, random_prompts, wait_until_equal
from tests.integration.test_prompt_tasks import cosine, logprobs, states
from tests.models.reference import reference_model

PROMPTS = [random_prompts(1, seed=length, length=length)[0] for length in (16, 90, 700)]
"""A block, a few, and more than a chunk."""


@pytest.mark.slow
def test_prompts_have_their_vectors_and_scores(
    cluster: TestCluster, small_model: Path, tmp_path: Path
) -> None:
    network = reference_model(small_model, scratch=tmp_path)
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="-", max_retries=0)
    truths = [logprobs(network, prompt) for prompt in PROMPTS]

    def vectors() -> None:
        answer = client.embeddings.create(model="small", input=PROMPTS)
        for prompt, each in zip(PROMPTS, answer.data, strict=True):
            assert cosine(np.array(each.embedding), states(network, prompt)[-1]) > 0.9999

    def echo() -> None:
        answer = cluster.complete(PROMPTS[1], echo=True, max_tokens=1, logprobs=1, temperature=0)
        given = answer["choices"][0]["logprobs"]
        assert len(given["token_logprobs"]) == len(PROMPTS[1]) + 1
        scored = given["token_logprobs"][1:-1]
        _assert_scores(scored, PROMPTS[1], truths[1])
        for at, (own, best) in enumerate(zip(scored, given["top_logprobs"][1:], strict=False), 1):
            is_greedy = int(truths[1][at - 1].argmax()) == PROMPTS[1][at]
            assert (own == max(best.values())) == is_greedy

    def prompt_logprobs(index: int) -> None:
        prompt = PROMPTS[index]
        answer = cluster.complete(prompt, max_tokens=2, prompt_logprobs=1, temperature=0)
        first, *others = answer["choices"][0]["prompt_logprobs"]
        assert first is None
        own = [entry[str(token)] for entry, token in zip(others, prompt[1:], strict=True)]
        _assert_scores([entry["logprob"] for entry in own], prompt, truths[index])

    def plain() -> None:
        """What shares the prompts' blocks is not disturbed."""
        answer = cluster.complete(PROMPTS[1], max_tokens=1, temperature=0, return_token_ids=True)
        assert answer["choices"][0]["token_ids"] == [int(truths[1][-1].argmax())]

    questions = [vectors, echo, lambda: prompt_logprobs(0), lambda: prompt_logprobs(2), plain]
    with ThreadPoolExecutor(len(questions)) as pool:
        for done in [pool.submit(question) for question in 2 * questions]:
            done.result()
    wait_until_equal("held at rest", lambda: held(cluster), 0, timeout_s=WAIT_S)


def _assert_scores(told: Sequence[float], prompt: list[int], truth: Any) -> None:
    """Of each token but the first."""
    expected = [float(truth[at - 1, prompt[at]]) for at in range(1, len(prompt))]
    for one, other in zip(told, expected, strict=True):
        assert math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-3)


@pytest.mark.slow
def test_a_prompt_that_cannot_be_scored_is_told_by_field(cluster: TestCluster) -> None:
    url = f"{cluster.url}/v1/completions"
    body = {"prompt": "x", "prompt_logprobs": -5}
    answer = httpx.post(url, json=body, timeout=WAIT_S)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt_logprobs"
