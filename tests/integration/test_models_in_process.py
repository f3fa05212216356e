"""Two models behind one gateway, over real sockets and stores, without Ray: each answers as its own
weights do, and what happens to the workers of one is not the other's."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from pdserve.messages import Role
from tests.integration.harness import random_prompts, settings, stream_tokens
from tests.integration.in_process import InProcessCluster, in_process
from tests.models.reference import reference_tokens
from tests.models.small import write_small_model

OUTPUT_TOKENS = 8
SEED = 91
ANSWER_S = 120


@dataclass(frozen=True, slots=True)
class House:
    first: InProcessCluster
    second: InProcessCluster
    prompt: list[int]
    expected: dict[str, list[int]]  # after it, by model

    def tokens(self, prompt: list[int], model: str, count: int = OUTPUT_TOKENS) -> list[int]:
        return asyncio.run(stream_tokens(self.first.url, prompt, count, model=model)).tokens

    def get(self, path: str, **query: str) -> Any:
        return httpx.get(f"{self.first.url}{path}", params=query, timeout=ANSWER_S).json()


@pytest.fixture(scope="module")
def house(
    small_model: Path, default_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[House]:
    new = tmp_path_factory.mktemp
    other = write_small_model(new("other"), tokenizer_from=default_model, seed=5, layers=3)
    print(f"seed {SEED}")
    prompt = random_prompts(1, seed=SEED, length=40)[0]
    expected = {  # first: who loads the reference holds up the threads of this process
        name: reference_tokens(path, [prompt], OUTPUT_TOKENS, scratch=new("reference"))[0]
        for name, path in (("one", small_model), ("two", other))
    }
    fields: dict[str, Any] = {"model": {"dtype": "float32"}}
    ours = settings(small_model, **fields)
    theirs = settings(other, router={"stand_in": False}, **fields)
    with (
        in_process(ours, new("one"), small_model, name="one") as first,
        in_process(theirs, new("two"), other, name="two", beside=first) as second,
    ):
        yield House(first, second, prompt, expected)


def test_each_answers_by_its_own_weights_and_blocks(house: House) -> None:
    prompt, expected = house.prompt, house.expected
    assert expected["one"] != expected["two"]
    for _ in range(2):  # the second time out of what was kept
        assert {name: house.tokens(prompt, name) for name in expected} == expected
    assert house.tokens(prompt, "") == expected["one"]


def test_both_are_told_of_and_an_unknown_one_is_refused(house: House) -> None:
    assert [card["id"] for card in house.get("/v1/models")["data"]] == ["one", "two"]
    refused = house.get("/v1/models/three")["error"]
    assert "serves 'one', 'two'" in refused["message"]
    whole, alone = house.get("/cluster/status"), house.get("/cluster/status", model="two")
    assert [worker["model"] for worker in whole["workers"]] == ["one", "one", "two", "two"]
    assert {worker["worker"] for worker in alone["workers"]} == house.second.names()


def test_a_model_without_a_decode_worker_leaves_the_other_as_it_was(house: House) -> None:
    """The last test of this house: nobody brings the worker back, and nobody stands in for it."""
    prompt = random_prompts(1, seed=SEED + 1, length=30)[0]
    before, workers = house.tokens(prompt, "one"), house.first.names()
    shell = next(s for s in house.second.workers.values() if s.role is Role.DECODE)
    house.second.do(shell.close())
    del house.second.workers[shell.worker]
    asked = {"model": "two", "prompt": prompt, "max_tokens": 4}
    late = httpx.post(
        f"{house.first.url}/v1/completions",
        json=asked,
        headers={"x-request-timeout-ms": "300"},
        timeout=ANSWER_S,
    )
    assert late.status_code in (408, 503, 504), late.text  # a typed error, in its time
    assert house.tokens(prompt, "one") == before
    assert house.first.names() == workers
