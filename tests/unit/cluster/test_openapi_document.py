"""The OpenAPI document speaks of every operation, and of none that is not there."""

import re

import hypothesis.strategies as st
import pytest
from hypothesis import given
from starlette.routing import Route

from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.openapi.bodies import below
from pdserve.config import GatewayConfig
from tests.unit.cluster.asgi import ask, get, post
from tests.unit.cluster.fake_session import MODEL, FakeSession

AUTOSCALING = ("/cluster/autoscaling", "/cluster/autoscaling/observations")


async def nothing() -> dict[str, object]:
    return {}


async def refused(worker: str, role: str) -> str:
    return f"{worker} cannot be {role}"


@pytest.mark.parametrize("with_cluster", [True, False])
def test_operations_are_the_routes(with_cluster: bool) -> None:
    app = create_app(
        FakeSession(),
        config=GatewayConfig(),
        snapshot=nothing if with_cluster else None,
        recording=nothing if with_cluster else None,
        operations=dict.fromkeys(AUTOSCALING, nothing) if with_cluster else None,
        assign=refused if with_cluster else None,
    )
    routes = {
        (route.path_format, method.lower())
        for route in app.routes
        if isinstance(route, Route) and route.include_in_schema
        for method in route.methods or ()
    }
    tree = get(app, "/openapi.json").json()
    assert {(path, method) for path, said in tree["paths"].items() for method in said} == routes
    names = [
        operation["operationId"] for said in tree["paths"].values() for operation in said.values()
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/tokenize", {"prompt": "hi"}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_every_optional_field_may_be_null(path: str, body: dict[str, object]) -> None:
    app = create_app(FakeSession(), config=GatewayConfig())
    tree = get(app, "/openapi.json").json()
    place = tree["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = tree["components"]["schemas"][place["$ref"].rpartition("/")[2]]
    nulls = dict.fromkeys(schema["properties"], None)
    assert set(body) <= set(nulls)
    assert post(app, path, nulls | body).status == 200


@given(limit=st.integers(1, 300_000), number=st.integers(0, 400_000))
def test_a_pattern_knows_the_numbers_below_a_limit(limit: int, number: int) -> None:
    pattern = re.compile(below(limit))
    for candidate in (number, limit, limit - 1):
        assert bool(pattern.fullmatch(str(candidate))) == (candidate < limit)
    assert not pattern.fullmatch(f"0{number}")


def test_a_refused_method_names_the_others() -> None:
    app = create_app(FakeSession(), config=GatewayConfig())
    for path, allowed in (("resp_1", "DELETE, GET"), ("input_tokens", "POST")):
        reply = ask(app, "PUT", f"/v1/responses/{path}", b"")
        assert reply.status == 405
        assert reply.headers["allow"] == allowed


def test_what_vllms_clients_look_at() -> None:
    app = create_app(FakeSession(), config=GatewayConfig())
    info = get(app, "/tokenizer_info").json()
    assert (info["eos_token"], info["model_max_length"]) == ("<eos>", 1000)
    assert get(app, "/load").json() == {"server_load": 0}
    assert get(app, "/v2/health/ready").json() == {"ready": True}
    assert ask(app, "POST", "/ping", b"").status == 200
    assert get(app, f"/v1/models/{MODEL}").json()["id"] == MODEL
