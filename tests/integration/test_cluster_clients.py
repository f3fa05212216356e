"""Clients that people have: the OpenAI SDK, plain gRPC, reflection; and clients that err."""

import asyncio
import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx
import openai
import pytest

from tests.integration.harness import TestCluster, wait_for

CHAT: Any = [{"role": "user", "content": "Say something."}]


def _client(cluster: TestCluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="-", max_retries=0)


def test_the_openai_sdk_streams_and_answers_the_same(cluster: TestCluster) -> None:
    client = _client(cluster)
    whole = client.chat.completions.create(
        model="small", messages=CHAT, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    )
    parts = client.chat.completions.create(
        model="small",
        messages=CHAT,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in parts:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 12
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or []) == 12
    assert [model.id for model in client.models.list()] == ["small", "terse", "verbose"]


def test_sixty_threads_with_a_penalty_get_what_each_gets_alone(cluster: TestCluster) -> None:
    prompts = [f"Tale {index}: once upon a time" for index in range(6)]
    together = threading.Barrier(60)

    def ask(prompt: str, penalty: float) -> list[int]:
        body = {
            "prompt": prompt,
            "max_tokens": 8,
            "temperature": 0,
            "presence_penalty": penalty,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        tokens: list[int] = answer.json()["choices"][0]["token_ids"]
        return tokens

    def thread(index: int) -> list[int]:
        together.wait(timeout=30)
        return ask(prompts[index % len(prompts)], 2.0)

    with httpx.Client(base_url=cluster.url, timeout=60) as client:
        alone = [ask(prompt, 2.0) for prompt in prompts]
        assert all(len(tokens) == 8 for tokens in alone)
        assert alone != [ask(prompt, 0.0) for prompt in prompts], "the penalty changes nothing"
        with ThreadPoolExecutor(60) as pool:
            answers = list(pool.map(thread, range(60)))
    assert answers == alone * 10


@pytest.mark.slow
def test_an_idle_connection_is_the_clients_to_close(cluster: TestCluster) -> None:
    """uvicorn closes it after 5 s unless told otherwise, perhaps under the next request."""
    address = urlsplit(cluster.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=10)
    connection.request("GET", "/v1/models")
    connection.getresponse().read()
    idle = connection.sock
    idle.settimeout(8)
    with pytest.raises(TimeoutError):
        idle.recv(1)
    idle.settimeout(10)
    connection.request("GET", "/v1/models")
    assert connection.getresponse().status == 200
    assert connection.sock is idle
    connection.close()


def test_the_async_sdk_cancels_and_the_cluster_forgets(cluster: TestCluster) -> None:
    async def leave_after_three() -> None:
        async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="-") as client:
            stream = await client.completions.create(
                model="small",
                prompt="On and on",
                max_tokens=4000,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            count = 0
            async for _ in stream:
                count += 1
                if count == 3:
                    await stream.close()
                    return

    asyncio.run(leave_after_three())
    wait_for(
        "the worker to stop",
        lambda: all(w["running"] == 0 for w in cluster.workers("decode")),
        timeout_s=5,
    )


def test_a_stop_string_ends_the_answer_before_it(cluster: TestCluster) -> None:
    free = cluster.complete("Tell me", max_tokens=40, temperature=0, ignore_eos=True)
    text = free["choices"][0]["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    cut = cluster.complete("Tell me", max_tokens=40, temperature=0, ignore_eos=True, stop=stop)
    assert cut["choices"][0]["text"] == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"


def test_grpc_chats_cancels_and_reflects(cluster: TestCluster) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    from pdserve.proto.v1 import inference_pb2, inference_pb2_grpc

    with grpc.insecure_channel(cluster.cluster.grpc) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        request = inference_pb2.ChatRequest(
            messages=[inference_pb2.ChatMessage(role="user", content="Say something.")],
            parameters=inference_pb2.Parameters(max_tokens=12, temperature=0.0),
        )
        text = "".join(chunk.text for chunk in stub.Chat(request, timeout=60))
        http_text = _client(cluster).chat.completions.create(
            model="small", messages=CHAT, max_tokens=12, temperature=0
        )
        assert text == http_text.choices[0].message.content
        services = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        names = {s.name for s in next(iter(services)).list_services_response.service}
        assert {"pdserve.v1.Inference", "grpc.health.v1.Health"} <= names


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": CHAT, "temperature": -1}, "temperature"),
        ({"messages": CHAT, "max_tokens": 0}, "max_tokens"),
        ({"messages": CHAT, "n": 10**9}, "n"),
        ({"messages": CHAT, "model": "no-such"}, "model"),
        ({"messages": [{"role": "user", "content": "x " * 9000}]}, "messages"),
        ({"messages": CHAT, "top_p": "much"}, "top_p"),
    ],
)
def test_bad_input_is_told_by_field_and_the_server_goes_on(
    cluster: TestCluster, body: dict[str, object], field: str
) -> None:
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=30)
    assert 400 <= answer.status_code < 500
    error = answer.json()["error"]
    assert field in str(error["param"])
    assert error["message"]
    assert httpx.get(f"{cluster.url}/health").status_code == 200


def test_malformed_json_is_a_400(cluster: TestCluster) -> None:
    answer = httpx.post(
        f"{cluster.url}/v1/completions",
        content=b'{"prompt": "x"',
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400
    assert json.loads(answer.text)["error"]["type"] == "invalid_request_error"


def test_a_deadline_ends_a_request_in_time(cluster: TestCluster) -> None:
    begun = time.monotonic()
    answer = httpx.post(
        f"{cluster.url}/v1/completions",
        json={"prompt": "x", "max_tokens": 8000, "ignore_eos": True},
        headers={"x-request-timeout-ms": "300"},
        timeout=60,
    )
    assert answer.status_code == 504
    assert time.monotonic() - begun < 5
