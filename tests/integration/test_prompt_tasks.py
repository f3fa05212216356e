"""What is asked of prompts themselves: vectors and scores as `transformers` has them, through
gateway, router and a prefill worker, and as clients ask for them."""

import base64
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pdserve.cluster.offline import LLM, SamplingParams
from pdserve.proto.vllm import engine_pb2 as vllm
from pdserve.proto.vllm.engine_pb2_grpc import VllmEngineStub
from tests.integration.harness import random_prompts, settings, wait_until_equal
from tests.integration.in_process import InProcessCluster, in_process
from tests.models.reference import reference_model

WAIT_S = 60.0
PROMPTS = [random_prompts(1, seed=length, length=length)[0] for length in (1, 2, 16, 17, 90)]
"""One token, less than a block, a block, a little more, and several chunks of 32."""


@pytest.fixture(scope="module")
def network(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return reference_model(small_model, scratch=tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def cluster(
    small_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    network: Any,  # first: who loads it holds up the threads of this process
) -> Iterator[InProcessCluster]:
    config = settings(
        small_model,
        model={"dtype": "float32"},
        prefill={"pool_blocks": 400, "chunk_tokens": 32},
        decode={"pool_blocks": 400},
        gateway={"grpc_port": 0},
    )
    with in_process(config, tmp_path_factory.mktemp("house"), small_model) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def quiet(cluster: InProcessCluster) -> Iterator[None]:
    yield
    wait_until_equal("held at rest", cluster.held, 0, timeout_s=WAIT_S)


def post(cluster: InProcessCluster, path: str, **body: Any) -> dict[str, Any]:
    reply = httpx.post(f"{cluster.url}{path}", json=body, timeout=WAIT_S)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


@torch.inference_mode()
def states(network: Any, prompt: list[int]) -> NDArray[np.float64]:
    """[N, C]: the last layer's, normalised, of each token."""
    hidden = network.model(torch.tensor([prompt])).last_hidden_state[0]
    found: NDArray[np.float64] = hidden.double().numpy()
    return found


@torch.inference_mode()
def logprobs(network: Any, prompt: list[int]) -> NDArray[np.float64]:
    """[N, V]: of what comes after each token."""
    found: NDArray[np.float64] = (
        network(torch.tensor([prompt])).logits[0].double().log_softmax(-1).numpy()
    )
    return found


def cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


# ── vectors ──────────────────────────────────────────────────────────────────────────────────────


def test_vectors_are_those_of_transformers_cached_or_not(
    cluster: InProcessCluster, network: Any
) -> None:
    for _ in range(2):
        answer = post(cluster, "/v1/embeddings", input=PROMPTS)
        assert [each["index"] for each in answer["data"]] == list(range(len(PROMPTS)))
        for prompt, each in zip(PROMPTS, answer["data"], strict=True):
            vector = np.array(each["embedding"])
            assert cosine(vector, states(network, prompt)[-1]) > 0.9999
            assert math.isclose(float(np.linalg.norm(vector)), 1.0, rel_tol=1e-5)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == usage["total_tokens"] == sum(map(len, PROMPTS))
    assert usage["prompt_tokens_details"]["cached_tokens"] == 16 + 80, "but for the last block"


def test_texts_base64_dimensions_and_truncation(cluster: InProcessCluster) -> None:
    text = "The lighthouse keeper counted the ships as they passed."
    plain = post(cluster, "/v1/embeddings", input=text)["data"][0]["embedding"]
    coded = post(cluster, "/v1/embeddings", input=[text], encoding_format="base64", dimensions=None)
    data = base64.b64decode(coded["data"][0]["embedding"])
    assert np.frombuffer(data, "<f4").tolist() == plain
    short = post(cluster, "/v1/embeddings", input=text, dimensions=8)["data"][0]["embedding"]
    assert cosine(np.array(short), np.array(plain[:8])) > 0.999999
    assert math.isclose(float(np.linalg.norm(short)), 1.0, rel_tol=1e-5)
    prompt = PROMPTS[-1]
    cut = post(cluster, "/v1/embeddings", input=prompt, truncate_prompt_tokens=17)
    assert cut["usage"]["prompt_tokens"] == 17
    assert cut["data"] == post(cluster, "/v1/embeddings", input=prompt[-17:])["data"]


# ── scores ───────────────────────────────────────────────────────────────────────────────────────


def test_an_echo_with_logprobs_is_a_score_of_the_prompt(
    cluster: InProcessCluster, network: Any
) -> None:
    """As a harness for evaluations asks: the likelihood of a continuation, and whether it is the
    one that the model would have chosen. The same numbers as in this process."""
    answer = post(
        cluster,
        "/v1/completions",
        **{"prompt": PROMPTS, "echo": True, "max_tokens": 1, "logprobs": 1, "temperature": 0.0},
    )
    for prompt, choice in zip(PROMPTS, answer["choices"], strict=True):
        given = choice["logprobs"]
        assert len(given["tokens"]) == len(prompt) + 1
        assert (given["token_logprobs"][0], given["top_logprobs"][0]) == (None, None)
        truth = logprobs(network, prompt)
        begin = len(prompt) // 2
        own = sum(truth[at - 1, prompt[at]] for at in range(max(begin, 1), len(prompt)))
        told = sum(given["token_logprobs"][max(begin, 1) : -1])
        assert math.isclose(told, own, rel_tol=1e-4, abs_tol=1e-3)
        for at in range(1, len(prompt)):
            best = max(given["top_logprobs"][at].values())
            assert math.isclose(best, truth[at - 1].max(), rel_tol=1e-4, abs_tol=1e-3)
            is_greedy = truth[at - 1].argmax() == prompt[at]
            assert (given["token_logprobs"][at] == best) == is_greedy


def test_what_was_generated_is_scored_with_the_same_numbers(cluster: InProcessCluster) -> None:
    """To the bit: by the same arithmetic, whatever chunks and steps it was computed in."""
    prompt = random_prompts(1, seed=5, length=40)[0]
    said = {"max_tokens": 20, "ignore_eos": True, "temperature": 0.0, "logprobs": 2}
    fresh = post(cluster, "/v1/completions", prompt=prompt, return_token_ids=True, **said)
    (choice,) = fresh["choices"]
    whole = [*prompt, *choice["token_ids"]]
    scored = post(cluster, "/v1/completions", prompt=whole, echo=True, max_tokens=0, logprobs=2)
    (echo,) = scored["choices"]
    assert (echo["finish_reason"], scored["usage"]["completion_tokens"]) == ("length", 0)
    assert echo["logprobs"]["token_logprobs"][40:] == choice["logprobs"]["token_logprobs"]
    assert echo["logprobs"]["top_logprobs"][40:] == choice["logprobs"]["top_logprobs"]


def test_prompt_logprobs_as_vllm_says_them(cluster: InProcessCluster, network: Any) -> None:
    prompt = PROMPTS[-1]
    asked = {"max_tokens": 2, "n": 2, "temperature": 0.0}
    answer = post(cluster, "/v1/completions", prompt=prompt, prompt_logprobs=3, **asked)
    truth = logprobs(network, prompt)
    for choice in answer["choices"]:
        first, *others = choice["prompt_logprobs"]
        assert first is None
        assert len(others) == len(prompt) - 1
        for at, entries in enumerate(others, 1):
            own, expected = entries[str(prompt[at])], truth[at - 1, prompt[at]]
            assert math.isclose(own["logprob"], expected, abs_tol=1e-3)
            better = [(truth[at - 1] > expected + error).sum() for error in (1e-3, -1e-3)]
            assert better[0] < own["rank"] <= better[1] + 1
            ranks = {entry["rank"] for entry in entries.values()}
            assert ranks == {1, 2, 3, own["rank"]}
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    messages = [{"role": "user", "content": "Where is the lighthouse?"}]
    chat = post(cluster, "/v1/chat/completions", messages=messages, max_tokens=1, prompt_logprobs=0)
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert all(len(entries) == 1 for entries in chat["prompt_logprobs"][1:])


def test_a_stream_begins_with_its_scored_echo(cluster: InProcessCluster) -> None:
    body = {"prompt": PROMPTS[2], "echo": True, "logprobs": 0, "max_tokens": 3, "temperature": 0.0}
    whole = post(cluster, "/v1/completions", **body)["choices"][0]
    url = f"{cluster.url}/v1/completions"
    texts, told = "", []
    with httpx.stream("POST", url, json=body | {"stream": True}, timeout=WAIT_S) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                (choice,) = httpx.Response(200, content=line[6:]).json()["choices"]
                texts += choice["text"]
                told += choice["logprobs"]["token_logprobs"]
    assert texts == whole["text"]
    assert told == whole["logprobs"]["token_logprobs"]


# ── texts compared, questions decided ────────────────────────────────────────────────────────────


def test_a_score_is_the_cosine_of_the_embeddings(cluster: InProcessCluster) -> None:
    texts = ["The keeper lit the lamp.", "A lighthouse.", "Seven blue ducks."]
    data = post(cluster, "/v1/embeddings", input=texts)["data"]
    query, *documents = (np.array(each["embedding"]) for each in data)
    truth = [float(query @ each) for each in documents]
    scores = post(cluster, "/v1/score", text_1=texts[0], text_2=texts[1:])["data"]
    np.testing.assert_allclose([each["score"] for each in scores], truth, atol=1e-6)
    ranked = post(cluster, "/v1/rerank", query=texts[0], documents=texts[1:])["results"]
    assert [each["index"] for each in ranked] == sorted(range(2), key=lambda at: -truth[at])


def test_a_decision_is_the_models_own_distribution(cluster: InProcessCluster, network: Any) -> None:
    values, story = ["red", "green", "blue"], "The lamp was lit, and it shone. " * 6
    asked = [
        {
            "type": "choice",
            "instructions": "Which?",
            "choices": [{"value": each} for each in values],
        },
        {"type": "predicate", "instructions": "Was it lit?"},
    ]
    said = post(cluster, "/v1/decisions", input=story, questions=asked)
    listed = "\n".join(f"- {each}" for each in values)
    words = f"{story}\n\nWhich?\nAnswer with one of these, and nothing else:\n{listed}"
    prompt = post(cluster, "/tokenize", messages=[{"role": "user", "content": words}])["tokens"]
    logs = []
    for value in values:
        label = post(cluster, "/tokenize", prompt=value, add_special_tokens=False)["tokens"]
        truth = logprobs(network, [*prompt, *label])
        logs.append(sum(truth[len(prompt) + at - 1, token] for at, token in enumerate(label)))
    shares = np.exp(np.array(logs) - max(logs))
    given = [each["probability"] for each in said["answers"][0]["probabilities"]]
    np.testing.assert_allclose(given, shares / shares.sum(), atol=1e-3)
    assert 0 < said["answers"][1]["probability"] < 1
    # The story is computed for the first question, and found by every other pass.
    tokens = len(post(cluster, "/tokenize", prompt=story)["tokens"])
    assert said["usage"]["input_tokens_details"]["cached_tokens"] >= tokens // 16 * 16


# ── by other ways ────────────────────────────────────────────────────────────────────────────────


def test_grpc_and_python_get_the_same_numbers(cluster: InProcessCluster) -> None:
    address = f"127.0.0.1:{cluster.front.ports['grpc']}"
    prompt = PROMPTS[-1]
    vector = post(cluster, "/v1/embeddings", input=prompt)["data"][0]["embedding"]
    with grpc.insecure_channel(address) as channel:
        engine = VllmEngineStub(channel)  # type: ignore[no-untyped-call]
        request = vllm.EmbedRequest(tokenized=vllm.TokenizedInput(input_ids=prompt))
        assert list(engine.Embed(request, timeout=WAIT_S).embedding) == vector
    body = {"prompt": prompt, "max_tokens": 1, "prompt_logprobs": 1, "temperature": 0.0}
    (choice,) = post(cluster, "/v1/completions", **body)["choices"]
    with LLM(address=address) as llm:
        (answer,) = llm.generate(
            [prompt], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
        )
    assert answer.outputs[0].text == choice["text"]
    assert answer.prompt_logprobs is not None
    told = [
        None if entries is None else {str(token): asdict(each) for token, each in entries.items()}
        for entries in answer.prompt_logprobs
    ]
    assert told == choice["prompt_logprobs"]
