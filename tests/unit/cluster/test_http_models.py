"""Two models behind one HTTP front: each request goes to its own, and all are told of."""

from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from pdserve.cluster.gateway.models import Controls, Models
from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.vllm_metrics import VllmMetrics
from pdserve.config import GatewayConfig
from tests.unit.cluster.asgi import get, post
from tests.unit.cluster.fake_session import FakeSession, said
from tests.unit.cluster.gateway.test_models import FakeRouter

CONFIG = GatewayConfig()
ASKS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/v1/responses": {"input": "hi"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
    "/v1/responses/input_tokens": {"input": "hi"},
}


class Two:
    def __init__(self) -> None:
        self.one, self.two = FakeSession(said("one")), FakeSession(said("two"), adapters=("lora",))
        self.one.model_name, self.two.model_name = "one", "org/two"
        self.two.context_tokens = 2000
        models = Models(self.one, CONFIG)
        models.add(self.two, GatewayConfig(reasoning_parser="qwen3"))
        routers = FakeRouter("one"), FakeRouter("org/two")
        self.controls = Controls("one", routers[0].control)
        self.controls.add("org/two", routers[1].control)
        self.app: FastAPI = create_app(
            self.one,
            config=CONFIG,
            models=models,
            controls=self.controls,
            snapshot=self.controls.snapshot,
            recording=routers[0].snapshot,
        )
        self.app.state.metrics.add_model(VllmMetrics("org/two", 2000))


@pytest.fixture
def two() -> Two:
    return Two()


@pytest.mark.parametrize("path", ASKS)
@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({}, "one"),
        ({"model": "one"}, "one"),
        ({"model": "org/two"}, "two"),
        ({"model": "lora"}, "two"),
    ],
)
def test_a_request_goes_to_the_model_that_it_names(
    two: Two, path: str, fields: dict[str, str], asked: str
) -> None:
    reply = post(two.app, path, ASKS[path] | fields)
    assert reply.status == 200
    assert reply.json()["model"] == fields.get("model", "one")
    calls = two.one.calls, two.two.calls
    assert [len(each) for each in calls] == ([1, 0] if asked == "one" else [0, 1])


@pytest.mark.parametrize("path", ASKS | OTHERS)
def test_an_unknown_model_is_a_404_that_names_all(two: Two, path: str) -> None:
    reply = post(two.app, path, (ASKS | OTHERS)[path] | {"model": "three"})
    assert reply.status == 404
    assert reply.error()["code"] == "model_not_found"
    assert "serves 'one', 'org/two', 'lora'" in reply.error()["message"]
    for name in ("three", "th/ree", "th\nree"):
        looked_up = get(two.app, f"/v1/models/{name}")
        assert (looked_up.status, looked_up.error()["code"]) == (404, "model_not_found")


def test_all_are_listed_and_found_by_name(two: Two) -> None:
    cards = get(two.app, "/v1/models").json()["data"]
    assert [(card["id"], card["parent"], card["max_model_len"]) for card in cards] == [
        ("one", None, 1000),
        ("org/two", None, 2000),
        ("lora", "org/two", 2000),
    ]
    assert get(two.app, "/v1/models/org/two").json() == cards[1]


def test_a_model_s_texts_are_read_in_its_own_way(two: Two) -> None:
    for session in (two.one, two.two):
        session.script = said("<think>hm</think>yes")
    told = [
        post(two.app, "/v1/chat/completions", ASKS["/v1/chat/completions"] | {"model": name})
        for name in ("one", "org/two")
    ]
    messages = [reply.json()["choices"][0]["message"] for reply in told]
    assert messages[0]["content"] == "<think>hm</think>yes"
    assert (messages[1]["reasoning_content"], messages[1]["content"]) == ("hm", "yes")


def test_figures_are_told_by_model_in_families_of_their_own(two: Two) -> None:
    for name in ("one", "org/two", "org/two"):
        post(two.app, "/v1/completions", ASKS["/v1/completions"] | {"model": name})
    text = get(two.app, "/metrics").body.decode()
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    values = {
        (sample.name, sample.labels["model_name"]): sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("model_name")
    }
    for name, answers in (("one", 1), ("org/two", 2)):
        assert values["vllm:request_success_total", name] == answers
        assert values["vllm:num_requests_running", name] == 1
        assert values["pdserve_worker_running", name] == 1


def test_the_routers_are_asked_together_or_one_by_one(two: Two) -> None:
    def workers(path: str) -> list[str]:
        return [worker["worker"] for worker in get(two.app, path).json()["workers"]]

    assert workers("/cluster/status") == ["one-1", "org/two-1"]
    assert workers("/cluster/status?model=org/two") == ["org/two-1"]
    assert workers("/cluster/recording") == ["one-1"]  # which has no sum: the first one's
    assert workers("/cluster/recording?model=org/two") == ["org/two-1"]
    refused = get(two.app, "/cluster/status?model=lora")  # it has no router of its own
    assert refused.status == 404
    assert "serves 'one', 'org/two'" in refused.error()["message"]


def test_an_ended_call_says_whose_it_was(two: Two) -> None:
    for name in ("one", "lora"):
        post(two.app, "/v1/completions", ASKS["/v1/completions"] | {"model": name})
    recent = get(two.app, "/cluster/requests").json()["requests"]
    assert [each["model"] for each in recent] == ["lora", "one"]


def test_the_document_speaks_of_all(two: Two) -> None:
    text = str(get(two.app, "/openapi.json").json())
    assert "'one', 'org/two', 'lora'" in text
