"""What one tenant's prompts tell another: nothing. Not in the usage, not in what is computed, and
(the slow test) not in the time to the first token.

Of time, each sample pairs a prompt that the other tenant has just warmed with one that nobody has
asked for; a coin says which goes first. If the spy could tell them apart, first tokens of warmed
prompts would come sooner: the share of pairs of samples in which they do is the area under the ROC
curve of the best guess by time, 0.5 for a coin. The same measurement over the spy's own warmed
prompts shows that it would see a hit.
"""

import random
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest

from pdserve.cluster.commands.key_edits import new_key
from tests.integration.harness import TestCluster, running, settings

PROMPT_TOKENS = 200
SEED = 11

SAMPLES = 40
LONG_TOKENS = 6000

CHANCE_SIGMAS = 4.5
"""How far from a coin's 0.5 chance alone may take the area: once in 150,000 runs."""


def _cached(answer: dict[str, Any]) -> int:
    count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


def _prompt(chance: random.Random, length: int) -> list[int]:
    return [chance.randrange(20, 40_000) for _ in range(length)]


def test_another_tenants_prompt_is_computed_again(cluster: TestCluster) -> None:
    print(f"seed {SEED}")
    prompt = _prompt(random.Random(SEED), PROMPT_TOKENS)
    asked = {"max_tokens": 1, "temperature": 0.0, "pdserve": {"why": True}}
    first = cluster.complete(prompt, user="victim", **asked)
    spied = cluster.complete(prompt, user="spy", **asked)
    again = cluster.complete(prompt, user="victim", **asked)
    assert (_cached(first), _cached(spied)) == (0, 0)
    assert _cached(again) >= PROMPT_TOKENS // 16 * 16, (
        "the prompt was not kept, so nothing is shown"
    )
    assert [one["cached_tokens"] for one in spied["pdserve"]["decisions"]] == [0]
    assert spied["choices"][0]["text"] == first["choices"][0]["text"]


@pytest.mark.slow
def test_time_does_not_tell_what_another_tenant_has_asked(
    small_model: Path, tmp_path: Path
) -> None:
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    file = tmp_path / "keys.json"
    victim, spy = (new_key(file, name, tenant=name) for name in ("victim", "spy"))
    config = settings(small_model, gateway={"http_port": 0, "grpc_port": 0, "api_keys": str(file)})
    with running(config) as cluster, httpx.Client(base_url=cluster.url, timeout=300) as http:

        def first_token_s(prompt: list[int], key: str) -> float:
            answer = http.post(
                "/v1/completions",
                json={"prompt": prompt, "max_tokens": 1, "user": "victim"},
                headers={"authorization": f"Bearer {key}"},
            )
            assert answer.status_code == 200, answer.text
            return answer.elapsed.total_seconds()

        def area(warmed_by: str) -> float:
            """That the spy tells warmed prompts from cold ones by their time."""
            warm_s: list[float] = []
            cold_s: list[float] = []
            for _ in range(SAMPLES):
                known, unknown = (_prompt(chance, LONG_TOKENS) for _ in range(2))
                first_token_s(known, warmed_by)
                both = [(known, warm_s), (unknown, cold_s)]
                chance.shuffle(both)
                for prompt, times_s in both:
                    times_s.append(first_token_s(prompt, spy))
            sooner = sum(warm < cold for warm, cold in product(warm_s, cold_s))
            return sooner / SAMPLES**2

        for _ in range(3):  # whatever is slow once
            first_token_s(_prompt(chance, LONG_TOKENS), spy)
        own, others = area(spy), area(victim)
    # Mann and Whitney's U over n·n pairs has variance n²(2n + 1)/12 under chance.
    sigma = ((2 * SAMPLES + 1) / (12 * SAMPLES**2)) ** 0.5
    print(f"area by own prompts {own:.3f}, by the other tenant's {others:.3f}, sigma {sigma:.3f}")
    assert own > 0.5 + CHANCE_SIGMAS * sigma, "a hit does not show in time: the test sees nothing"
    assert abs(others - 0.5) <= CHANCE_SIGMAS * sigma
