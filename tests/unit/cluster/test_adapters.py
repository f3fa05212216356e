"""Adapters at the fronts: who is asked, under which name it answers, and what is listed."""

import pytest

from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig
from tests.unit.cluster.asgi import get, post
from tests.unit.cluster.fake_session import ADAPTER, MODEL, FakeSession

ASKS: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
}


@pytest.mark.parametrize("path", ASKS)
@pytest.mark.parametrize(
    ("fields", "adapter"), [({"model": ADAPTER}, ADAPTER), ({"model": MODEL}, None), ({}, None)]
)
def test_the_name_in_model_selects_and_is_answered_under(
    path: str, fields: dict[str, object], adapter: str | None
) -> None:
    session = FakeSession(adapters=(ADAPTER,))
    app = create_app(session, config=GatewayConfig())
    whole = post(app, path, ASKS[path] | fields)
    streamed = post(app, path, ASKS[path] | fields | {"stream": True})
    assert [call.adapter for call in session.calls] == [adapter, adapter]
    assert whole.json()["model"] == (adapter or MODEL)
    assert {event["model"] for event in streamed.events()} == {adapter or MODEL}


def test_the_list_has_the_base_model_and_what_adapts_it() -> None:
    app = create_app(FakeSession(adapters=(ADAPTER,)), config=GatewayConfig())
    base, adapter = get(app, "/v1/models").json()["data"]
    assert (base["id"], base["parent"]) == (MODEL, None)
    assert (adapter["id"], adapter["parent"]) == (ADAPTER, MODEL)
    assert adapter["max_model_len"] == base["max_model_len"]
    assert get(app, f"/v1/models/{ADAPTER}").json() == adapter


def test_an_unknown_name_is_told_all_that_there_are() -> None:
    app = create_app(FakeSession(adapters=(ADAPTER,)), config=GatewayConfig())
    reply = post(app, "/v1/completions", {"prompt": "hi", "model": "fake"})
    assert reply.status == 404
    assert f"serves '{MODEL}', '{ADAPTER}'" in reply.json()["error"]["message"]


def test_an_adapter_s_name_tokenises_as_the_base_model() -> None:
    app = create_app(FakeSession(adapters=(ADAPTER,)), config=GatewayConfig())
    assert post(app, "/tokenize", {"prompt": "hi", "model": ADAPTER}).json()["count"] == 2
