"""lm-eval against a cluster of Ray gives the score that it would give in one process.

The task is our own, since data sets come from a hub: which city's name is likelier after "The
capital of … is"? And what does the model say itself?
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from pdserve.text.tokenizer import load_tokenizer
from tests.clients.matrix import TEST_S_MAX, recorded, run, script_of
from tests.integration.harness import WAIT_S, TestCluster, held, wait_until_equal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TEST_S_MAX)]

CITIES = {
    "France": ("Paris", "Lyon", "Nice"),
    "Germany": ("Berlin", "Hamburg", "Munich"),
    "Italy": ("Rome", "Milan", "Naples"),
    "Spain": ("Madrid", "Barcelona", "Seville"),
    "Portugal": ("Lisbon", "Porto", "Faro"),
    "Greece": ("Athens", "Patras", "Sparta"),
    "Austria": ("Vienna", "Graz", "Salzburg"),
    "Hungary": ("Budapest", "Szeged", "Debrecen"),
    "Poland": ("Warsaw", "Krakow", "Gdansk"),
    "Sweden": ("Stockholm", "Gothenburg", "Uppsala"),
    "Norway": ("Oslo", "Bergen", "Trondheim"),
    "Finland": ("Helsinki", "Turku", "Tampere"),
    "Ireland": ("Dublin", "Cork", "Galway"),
    "Egypt": ("Cairo", "Alexandria", "Luxor"),
    "Kenya": ("Nairobi", "Mombasa", "Nakuru"),
    "Japan": ("Tokyo", "Osaka", "Kyoto"),
    "India": ("New Delhi", "Mumbai", "Chennai"),
    "Turkey": ("Ankara", "Istanbul", "Izmir"),
    "Australia": ("Canberra", "Sydney", "Perth"),
    "Canada": ("Ottawa", "Toronto", "Montreal"),
}
"""By country, its capital first."""

QUESTION = "The capital of {country} is"
LIKELIER, SAID = "capitals", "capitals_said"
ANSWER_TOKENS = 8

Likelihood = tuple[float, bool]
"""The natural logarithm of an answer's likelihood, and whether each token of it is the one that the
model would choose."""


def write_tasks(directory: Path) -> None:
    """Two of them, as lm-eval reads them (JSON is YAML), and their data."""
    data = directory / "capitals.jsonl"
    rows = [{"country": country, "cities": cities} for country, cities in CITIES.items()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    both: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": QUESTION.replace("{country}", "{{country}}"),
    }
    likelier = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{cities}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    said = {
        "output_type": "generate_until",
        "doc_to_target": "{{cities[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": ANSWER_TOKENS, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    }
    for name, task in ((LIKELIER, likelier), (SAID, said)):
        (directory / f"{name}.yaml").write_text(json.dumps(both | task | {"task": name}))


def evaluated(url: str, model: str, directory: Path, *tokenizer: str) -> dict[str, Any]:
    """Its results, and under the tasks' names their samples, in the order of the data."""
    write_tasks(directory)
    arguments = [
        *(f"model={model}", f"base_url={url}/v1/completions", *tokenizer),
        *("tokenized_requests=True", "num_concurrent=4", "max_retries=1", "timeout=120"),
    ]
    run(
        [
            *(script_of("lm_eval", "lm-eval"), "run", "--model", "local-completions"),
            *("--model_args", ",".join(arguments), "--tasks", f"{LIKELIER},{SAID}"),
            *("--include_path", directory, "--output_path", directory / "out", "--log_samples"),
        ],
        more={"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory / "hf")},
    )
    (results,) = (directory / "out").rglob("results_*.json")
    found: dict[str, Any] = json.loads(results.read_text())["results"]
    for name in (LIKELIER, SAID):
        (samples,) = (directory / "out").rglob(f"samples_{name}_2*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        found[f"{name} samples"] = sorted(rows, key=lambda row: int(row["doc_id"]))
    return found


@torch.inference_mode()
def likelihoods(network: Any, question: list[int], answers: list[list[int]]) -> list[Likelihood]:
    """Of each answer behind the question, in this process and one batch: what pads the shorter ones
    is behind them, where no token of theirs looks."""
    longest = max(map(len, answers))
    batch = [question + answer + [0] * (longest - len(answer)) for answer in answers]
    logits = network(torch.tensor(batch)).logits[:, len(question) - 1 :].double()
    found = []
    for answer, own in zip(answers, logits.log_softmax(-1), strict=True):
        tokens = torch.tensor(answer)
        logprobs = own[: len(answer)]
        chosen = logprobs.gather(1, tokens[:, None])
        found.append((float(chosen.sum()), bool((logprobs.argmax(-1) == tokens).all())))
    return found


@pytest.mark.parametrize("tokenizer", ["the cluster's", "a directory"])
def test_the_score_is_that_of_one_process(
    real_cluster: TestCluster,
    default_model: Path,
    small_model: Path,
    reference: Any,
    tokenizer: str,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Goal: likelihoods, greedy or not, accuracy and answers are those of `transformers` here.
    Method: the same weights in float32, summed in another order; both ways to a tokeniser, the
    second without a hub."""
    recorded(
        record_property,
        "lm-eval",
        "on a whole cluster: local-completions, likelihoods of choices and answers, the score of "
        "one process; tokens by tokenizer_info and tokenize, or of a directory",
    )
    name = httpx.get(f"{real_cluster.url}/v1/models", timeout=WAIT_S).json()["data"][0]["id"]
    how = ["tokenizer_backend=remote"]
    if tokenizer == "a directory":
        how = ["tokenizer_backend=huggingface", f"tokenizer={small_model}"]
    found = evaluated(real_cluster.url, name, tmp_path, *how)

    encode = load_tokenizer(default_model).encode
    right = 0
    rows = found[f"{LIKELIER} samples"]
    assert len(rows) == len(CITIES)
    for row, (country, cities) in zip(rows, CITIES.items(), strict=True):
        question = QUESTION.format(country=country)
        before = encode(question)
        whole = [encode(f"{question} {city}") for city in cities]
        assert all(tokens[: len(before)] == before for tokens in whole)
        own = likelihoods(reference, before, [tokens[len(before) :] for tokens in whole])
        for (told, greedy), (expected, is_greedy) in zip(row["filtered_resps"], own, strict=True):
            assert math.isclose(float(told), expected, rel_tol=1e-4, abs_tol=2e-3), row
            assert greedy == str(is_greedy), row
        right += max(range(len(cities)), key=lambda index: own[index][0]) == 0
    assert found[LIKELIER]["acc,none"] == pytest.approx(right / len(CITIES))
    assert 0 < right < len(CITIES), "a task that tells models apart"

    for row, country in zip(found[f"{SAID} samples"], CITIES, strict=True):
        plain = real_cluster.complete(
            encode(QUESTION.format(country=country)), max_tokens=ANSWER_TOKENS, temperature=0
        )
        assert row["filtered_resps"] == [plain["choices"][0]["text"].split(".")[0]]
    wait_until_equal("held at rest", lambda: held(real_cluster), 0, timeout_s=WAIT_S)
