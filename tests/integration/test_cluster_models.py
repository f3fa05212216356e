"""Two models in one cluster on a real Ray: each answers as its own weights do, and neither notices
what happens to the other."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest

from pdserve.cluster.commands.deploy import deploy
from pdserve.config import ClusterConfig
from pdserve.proto.kserve import inference_pb2 as kserve
from pdserve.proto.kserve.inference_pb2_grpc import GRPCInferenceServiceStub
from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.proto.v1.inference_pb2_grpc import InferenceStub
from pdserve.settings import from_tree, to_tree
from tests.integration.harness import (
    WAIT_S,
    TestCluster,
    gone,
    random_prompts,
    replicas,
    running,
    settings,
    stream_tokens,
)
from tests.models.reference import reference_tokens
from tests.models.small import write_small_model

pytestmark = pytest.mark.slow

OUTPUT_TOKENS = 12
FIRST, SECOND, THIRD = "small", "other/model-2", "third"
"""The second has a name that no deployment may have."""


@pytest.fixture(scope="module")
def weights(
    small_model: Path, default_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Three models by name: other numbers, and for one other shapes, so other blocks."""
    other = write_small_model(
        tmp_path_factory.mktemp("other"), tokenizer_from=default_model, seed=5, layers=3
    )
    third = write_small_model(
        tmp_path_factory.mktemp("third"), tokenizer_from=default_model, seed=9
    )
    return {FIRST: small_model, SECOND: other, THIRD: third}


def of_models(weights: dict[str, Path], *further: str) -> ClusterConfig:
    return settings(
        weights[FIRST],
        model={"dtype": "float32", "served_name": FIRST},
        models={name: {"model": {"source": str(weights[name])}} for name in further},
    )


@pytest.fixture(scope="module")
def cluster_of_two(weights: dict[str, Path]) -> Iterator[TestCluster]:
    with running(of_models(weights, SECOND)) as cluster:
        yield cluster


def tokens(cluster: TestCluster, prompt: list[int], model: str) -> list[int]:
    return asyncio.run(stream_tokens(cluster.url, prompt, OUTPUT_TOKENS, model=model)).tokens


def listed(cluster: TestCluster) -> list[str]:
    return [each["id"] for each in httpx.get(f"{cluster.url}/v1/models").json()["data"]]


def pids_by_model(cluster: TestCluster) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for worker in cluster.status()["workers"]:
        found.setdefault(worker["model"], set()).add(worker["pid"])
    return found


def test_each_model_answers_as_its_weights_do(
    cluster_of_two: TestCluster, weights: dict[str, Path], tmp_path: Path
) -> None:
    """All at once, the same prompts for both; then again, out of the stores."""
    prompts = [*random_prompts(2, seed=81, length=40), *random_prompts(1, seed=82, length=150)]
    names = (FIRST, SECOND)
    expected = [
        each
        for name in names
        for each in reference_tokens(weights[name], prompts, OUTPUT_TOKENS, scratch=tmp_path)
    ]

    async def ask() -> list[list[int]]:
        async with httpx.AsyncClient(timeout=300) as client:
            streams = await asyncio.gather(
                *(
                    stream_tokens(
                        cluster_of_two.url, prompt, OUTPUT_TOKENS, client=client, model=name
                    )
                    for name in names
                    for prompt in prompts
                )
            )
        return [stream.tokens for stream in streams]

    assert len({tuple(each) for each in expected}) == len(expected)
    assert asyncio.run(ask()) == expected
    assert asyncio.run(ask()) == expected
    assert tokens(cluster_of_two, prompts[0], "") == expected[0]  # none named: the first


def test_both_are_listed_everywhere_and_an_unknown_one_is_told_who_is_there(
    cluster_of_two: TestCluster,
) -> None:
    url, target = cluster_of_two.url, cluster_of_two.cluster.grpc
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
    assert [model.id for model in client.models.list()] == [FIRST, SECOND]
    assert client.models.retrieve(SECOND).id == SECOND
    with pytest.raises(openai.NotFoundError, match=f"serves '{FIRST}', '{SECOND}'"):
        client.completions.create(model="no-such", prompt="hi")
    answer = client.chat.completions.create(
        model=SECOND, messages=[{"role": "user", "content": "hi"}], max_tokens=3
    )
    assert answer.model == SECOND
    with grpc.insecure_channel(target) as channel:
        ours, theirs = InferenceStub(channel), GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        assert [m.id for m in ours.ListModels(pb.ListModelsRequest()).models] == [FIRST, SECOND]
        for name, ready in ((FIRST, True), (SECOND, True), ("no-such", False)):
            assert theirs.ModelReady(kserve.ModelReadyRequest(name=name)).ready is ready
        metadata = theirs.ModelMetadata(kserve.ModelMetadataRequest(name=SECOND))
        assert metadata.name == SECOND
        chunks = list(ours.Generate(pb.GenerateRequest(model=SECOND, text="hi")))
        assert chunks[-1].usage.completion_tokens > 0
        with pytest.raises(grpc.RpcError) as refused:
            list(ours.Generate(pb.GenerateRequest(model="no-such", text="hi")))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    metrics = httpx.get(f"{url}/metrics").text
    for name in (FIRST, SECOND):
        assert f'vllm:num_requests_running{{engine="0",model_name="{name}"}}' in metrics
        assert f'pdserve_queue_requests{{model_name="{name}",level="0"}}' in metrics
    status: dict[str, Any] = httpx.get(f"{url}/cluster/status").json()
    assert {worker["model"] for worker in status["workers"]} == {FIRST, SECOND}
    alone: dict[str, Any] = httpx.get(f"{url}/cluster/status", params={"model": SECOND}).json()
    theirs_alone = {w["worker"] for w in status["workers"] if w["model"] == SECOND}
    assert {worker["worker"] for worker in alone["workers"]} == theirs_alone
    assert httpx.get(f"{url}/cluster/status", params={"model": "x"}).status_code == 404


def test_the_death_of_one_model_s_worker_is_not_the_other_s(cluster_of_two: TestCluster) -> None:
    """The other's streams go on without a new attempt; the one that was struck answers again."""
    prompt = random_prompts(1, seed=83, length=30)[0]
    before = {name: tokens(cluster_of_two, prompt, name) for name in (FIRST, SECOND)}
    pids = pids_by_model(cluster_of_two)
    struck = next(
        worker["pid"]
        for worker in cluster_of_two.status()["workers"]
        if worker["model"] == SECOND and worker["role"] == "decode"
    )
    os.kill(struck, signal.SIGKILL)
    assert tokens(cluster_of_two, prompt, FIRST) == before[FIRST]
    assert tokens(cluster_of_two, prompt, SECOND) == before[SECOND]  # by the next worker
    _wait(lambda: gone(struck))
    assert pids_by_model(cluster_of_two)[FIRST] == pids[FIRST]
    losses = cluster_of_two.status()["models"][FIRST]["counters"].get("workers_lost", 0)
    assert losses == 0


def test_a_model_comes_and_goes_and_nobody_else_is_restarted(
    cluster_of_two: TestCluster, weights: dict[str, Path], tmp_path: Path
) -> None:
    """With a stream of the first model that is open all the while."""
    prompt = random_prompts(1, seed=84, length=30)[0]
    expected = reference_tokens(weights[THIRD], [prompt], OUTPUT_TOKENS, scratch=tmp_path)[0]
    _wait(lambda: [len(each) for each in pids_by_model(cluster_of_two).values()] == [2, 2])
    pids, gateway = pids_by_model(cluster_of_two), replicas("gateway")
    directory = cluster_of_two.cluster.directory / "s"

    def deploy_with(*further: str) -> None:
        tree = {**to_tree(of_models(weights, *further)), "directory": str(directory)}
        deploy(from_tree(tree), ray_address="auto")

    async def while_it_runs() -> list[int]:
        stream = asyncio.create_task(stream_tokens(cluster_of_two.url, prompt, 2000, model=FIRST))
        await asyncio.to_thread(deploy_with, SECOND, THIRD)
        return (await stream).tokens

    long = asyncio.run(while_it_runs())
    assert long == tokens_of(cluster_of_two, prompt, 2000, FIRST)
    assert listed(cluster_of_two) == [FIRST, SECOND, THIRD]
    assert tokens(cluster_of_two, prompt, THIRD) == expected
    now = pids_by_model(cluster_of_two)
    assert {name: now[name] for name in (FIRST, SECOND)} == pids
    assert replicas("gateway") == gateway

    deploy_with(SECOND)
    assert listed(cluster_of_two) == [FIRST, SECOND]
    _wait(lambda: all(gone(pid) for pid in now[THIRD]))
    assert pids_by_model(cluster_of_two) == pids
    assert replicas("gateway") == gateway


def tokens_of(cluster: TestCluster, prompt: list[int], count: int, model: str) -> list[int]:
    return asyncio.run(stream_tokens(cluster.url, prompt, count, model=model)).tokens


def _wait(reached: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)
