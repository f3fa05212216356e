"""Keys of the gateway: who is let in, how often, and what a change of the file does."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.clock import S
from pdserve.cluster.commands.key_edits import new_key, remove_key
from pdserve.cluster.gateway.access import BURST_S, Doorkeeper, digest_of, read_keys, secret_of
from pdserve.cluster.http import console
from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig
from pdserve.errors import ConfigError, Forbidden, RateLimited, Unauthorized
from tests.unit.cluster.asgi import Reply, ask
from tests.unit.cluster.fake_session import FakeSession, said


class Time:
    now_ns = 0

    def __call__(self) -> int:
        return self.now_ns

    def pass_s(self, seconds: float) -> None:
        self.now_ns += round(seconds * S)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def door(file: Path | None, time: Time) -> Doorkeeper:
    return Doorkeeper(file, clock=time)


# ── the file ─────────────────────────────────────────────────────────────────────────────────────


def test_a_key_is_in_no_file(file: Path) -> None:
    secret = new_key(file, "ann", tenant="team")
    assert secret not in file.read_text()
    assert len(secret) > 60
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["keys.json"]
    (key,) = read_keys(file).keys
    assert (key.name, key.tenant, key.sha256, key.admin) == (
        "ann",
        "team",
        digest_of(secret),
        False,
    )


def test_names_are_unique_and_what_cannot_be_used_is_not_written(file: Path) -> None:
    new_key(file, "ann", tenant="team")
    before = file.read_text()
    for name, tenant, rate in (("ann", "t", None), ("a b", "t", None), ("b", "", 1), ("b", "t", 0)):
        with pytest.raises(ConfigError):
            new_key(file, name, tenant=tenant, requests_per_min=rate)
    with pytest.raises(ConfigError, match="it has: ann"):
        remove_key(file, "bob")
    assert file.read_text() == before


GOOD = {"name": "a", "tenant": "t", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ("{", "cannot be read as JSON"),
        ([], "must hold"),
        ({"keys": [4]}, "keys.0 is 4"),
        ({"keys": [GOOD | {"name": "a b"}]}, "keys.0.name"),
        ({"keys": [GOOD | {"tenant": ""}]}, "keys.0.tenant"),
        ({"keys": [GOOD | {"sha256": "secret"}]}, "keys.0.sha256"),
        ({"keys": [GOOD | {"admin": 1}]}, "keys.0.admin"),
        ({"keys": [GOOD | {"requests_per_min": True}]}, "keys.0.requests_per_min"),
        ({"keys": [GOOD | {"rate": 1}]}, "has 'rate', which is none of name"),
        ({"keys": [GOOD, GOOD]}, "two keys have the same name"),
    ],
)
def test_a_bad_file_is_told_by_its_field(file: Path, tree: Any, told: str) -> None:
    file.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    with pytest.raises(ConfigError, match=r"gateway\.api_keys") as refused:
        Doorkeeper(file)
    assert told in str(refused.value)


# ── the door ─────────────────────────────────────────────────────────────────────────────────────


def test_without_a_file_everybody_is_let_in(time: Time) -> None:
    assert door(None, time).admit(None, admin=True) is None


def test_only_known_keys_are_let_in(file: Path, time: Time) -> None:
    secret = new_key(file, "ann", tenant="team")
    keeper = door(file, time)
    key = keeper.admit(secret)
    assert key is not None
    assert key.tenant == "team"
    for wrong in (None, "", secret[:-1], secret + "0", digest_of(secret), "\ud800"):
        with pytest.raises(Unauthorized):
            keeper.admit(wrong)
    with pytest.raises(Forbidden):
        keeper.admit(secret, admin=True)


def test_keys_come_and_go_without_a_restart(file: Path, time: Time) -> None:
    ann = new_key(file, "ann", tenant="a")
    keeper = door(file, time)
    bob = new_key(file, "bob", tenant="b")
    time.pass_s(2)
    assert keeper.admit(bob) is not None
    remove_key(file, "ann")
    time.pass_s(2)
    with pytest.raises(Unauthorized):
        keeper.admit(ann)
    assert keeper.admit(bob) is not None


@pytest.mark.parametrize("damage", ["broken", "gone"])
def test_a_file_that_cannot_be_read_leaves_the_last_good_keys(
    file: Path, time: Time, damage: str
) -> None:
    ann = new_key(file, "ann", tenant="a")
    good = file.read_text()
    keeper = door(file, time)
    if damage == "gone":
        os.unlink(file)
    else:
        file.write_text(good[:-5])
    time.pass_s(2)
    assert keeper.admit(ann) is not None
    with pytest.raises(Unauthorized):
        keeper.admit("other")
    file.write_text(json.dumps({"keys": []}))
    time.pass_s(2)
    with pytest.raises(Unauthorized):
        keeper.admit(ann)


@given(per_min=st.integers(1, 600), gaps_ms=st.lists(st.integers(0, 3000), max_size=60))
def test_a_rate_holds_over_any_minute(
    tmp_path_factory: pytest.TempPathFactory, per_min: int, gaps_ms: list[int]
) -> None:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    secret = new_key(file, "ann", tenant="a", requests_per_min=per_min)
    time = Time()
    keeper = door(file, time)
    admitted: list[int] = []
    for gap_ms in gaps_ms:
        time.pass_s(gap_ms / 1000)
        try:
            keeper.admit(secret)
        except RateLimited as refused:
            time.pass_s((refused.retry_after_ms or 0) / 1000)
            keeper.admit(secret)  # as it was told
        admitted.append(time.now_ns)
    for first, at_ns in enumerate(admitted):
        span = [each for each in admitted[first:] if each - at_ns < 60 * S]
        assert len(span) <= per_min + per_min * BURST_S // 60 + 1


@pytest.mark.parametrize(
    ("headers", "secret"),
    [
        ({"authorization": "Bearer k"}, "k"),
        ({"authorization": "bearer  k "}, "k"),
        ({"x-api-key": "k"}, "k"),
        ({"authorization": "Basic k"}, None),
        ({"authorization": "Bearer"}, None),
        ({}, None),
    ],
)
def test_where_a_key_may_stand(headers: dict[str, str], secret: str | None) -> None:
    assert secret_of(headers) == secret


# ── over HTTP ────────────────────────────────────────────────────────────────────────────────────

CHAT = ("POST", "/v1/chat/completions")
BODY = {"messages": [{"role": "user", "content": "hi"}], "user": "somebody else"}


def served(file: Path, time: Time) -> tuple[Any, FakeSession]:
    async def snapshot() -> dict[str, Any]:
        return {}

    session = FakeSession(said("so"))
    config = GatewayConfig()
    file.write_text('{"keys": []}')
    app = create_app(session, config=config, snapshot=snapshot, doorkeeper=door(file, time))
    return app, session


def asked(app: Any, how: tuple[str, str], key: str | None = None) -> Reply:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return ask(app, *how, BODY, headers={"content-type": "application/json", **headers})


def test_the_tenant_is_the_key_s(file: Path, time: Time) -> None:
    app, session = served(file, time)
    secret = new_key(file, "ann", tenant="team")
    time.pass_s(2)
    assert asked(app, CHAT, secret).status == 200
    assert session.calls[0].tenant == "team"


HEALTH_PATHS = ("/health", "/ping", "/v2/health/live", "/v2/health/ready")


def test_every_path_but_health_and_console_needs_a_key(file: Path, time: Time) -> None:
    app, session = served(file, time)
    for route in app.routes:
        for method in route.methods - {"HEAD"}:
            status = asked(app, (method, route.path)).status
            is_open = route.path in (*HEALTH_PATHS, *console.PATHS)
            assert status == (200 if is_open else 401), route.path
    assert asked(app, ("GET", "/nowhere")).status == 401
    assert asked(app, ("GET", "/health/")).status == 401
    assert not session.calls


def test_a_refusal_is_as_openai_s_clients_expect_it(file: Path, time: Time) -> None:
    app, _ = served(file, time)
    reply = asked(app, CHAT)
    assert reply.status == 401
    assert reply.error()["code"] == "invalid_api_key"
    assert reply.headers["www-authenticate"] == "Bearer"
    assert "x-request-id" in reply.headers


def test_the_cluster_is_the_admin_s(file: Path, time: Time) -> None:
    app, _ = served(file, time)
    ann = new_key(file, "ann", tenant="a")
    root = new_key(file, "root", tenant="r", admin=True)
    time.pass_s(2)
    status = ("GET", "/cluster/status")
    assert [asked(app, status, key).status for key in (ann, root)] == [403, 200]
    assert asked(app, ("GET", "/metrics"), ann).status == 200


def test_too_many_are_told_when_to_come_back(file: Path, time: Time) -> None:
    app, _ = served(file, time)
    ann = new_key(file, "ann", tenant="a", requests_per_min=1)
    time.pass_s(2)
    assert [asked(app, CHAT, ann).status for _ in range(2)] == [200, 429]
    reply = asked(app, CHAT, ann)
    assert reply.error()["code"] == "rate_limit_exceeded"
    assert int(reply.headers["retry-after"]) == 60
    assert asked(app, ("GET", "/v1/models"), ann).status == 200
