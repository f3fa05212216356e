"""Budgets of tokens: windows, several gateways that add up, the file, and the door."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pdserve.clock import S
from pdserve.cluster.commands.key_edits import new_key, remove_key, set_quota
from pdserve.cluster.gateway.access import Doorkeeper, read_keys
from pdserve.cluster.gateway.quotas import MINUTE_MS, NO_QUOTA, Ledger, Period, Quota
from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig
from pdserve.errors import ConfigError, RateLimited
from tests.unit.cluster.asgi import Reply, ask
from tests.unit.cluster.fake_session import FakeSession, said

DAY_MS = Period.DAY.value


def refused(ledger: Ledger, tenant: str, now_ms: int) -> RateLimited | None:
    try:
        ledger.check(tenant, now_ms)
    except RateLimited as error:
        return error
    return None


def test_a_window_s_budget_is_there_again_with_the_next_window() -> None:
    ledger = Ledger({"ann": Quota(tokens_per_min=10, tokens_per_day=15)})
    ledger.spend("ann", 9, 0)
    assert refused(ledger, "ann", 0) is None
    ledger.spend("ann", 1, 20_000)
    error = refused(ledger, "ann", 20_000)
    assert error is not None
    assert error.retry_after_ms == 40_000
    assert "10 tokens this minute, of 10" in str(error)
    assert refused(ledger, "ann", MINUTE_MS) is None
    ledger.spend("ann", 5, MINUTE_MS)
    error = refused(ledger, "ann", MINUTE_MS)
    assert error is not None
    assert error.retry_after_ms == DAY_MS - MINUTE_MS
    assert "this day" in str(error)
    assert refused(ledger, "ann", DAY_MS) is None


def test_who_has_no_quota_is_not_remembered() -> None:
    ledger = Ledger({"ann": Quota(tokens_per_min=10)})
    ledger.spend("bob", 10**9, 0)
    assert refused(ledger, "bob", 0) is None
    assert ledger.entries(0) == []


def test_what_was_spent_outlives_a_change_of_the_quota_but_not_its_end() -> None:
    ledger = Ledger({"ann": Quota(tokens_per_min=10)})
    ledger.spend("ann", 10, 0)
    ledger.set_quotas({"ann": Quota(tokens_per_min=20, tokens_per_day=5)})
    assert refused(ledger, "ann", 0) is None, "the day is counted from now on"
    ledger.spend("ann", 10, 0)
    assert refused(ledger, "ann", 0) is not None
    ledger.set_quotas({})
    assert refused(ledger, "ann", 0) is None
    assert ledger.entries(0) == []


# ── several gateways ─────────────────────────────────────────────────────────────────────────────

TENANTS = ("ann", "bob:1")
BOUND = 50


@dataclass(slots=True)
class Redis:
    """What ``SharedCounts`` does, without a server."""

    sums: dict[str, int] = field(default_factory=dict)

    def add(self, counts: dict[str, int]) -> dict[str, int]:
        for name, count in counts.items():
            self.sums[name] = self.sums.get(name, 0) + count
        return {name: self.sums[name] for name in counts}


class GatewaysMachine(RuleBasedStateMachine):
    """Three gateways spend, exchange and are cut off; time passes."""

    @initialize()
    def start(self) -> None:
        quota = Quota(tokens_per_min=BOUND, tokens_per_day=3 * BOUND)
        self.ledgers = [Ledger(dict.fromkeys(TENANTS, quota)) for _ in range(3)]
        self.redis = Redis()
        self.now_ms = DAY_MS - 3 * MINUTE_MS
        self.spent: dict[tuple[str, Period, int], int] = {}

    @rule(gateway=st.integers(0, 2), tenant=st.sampled_from(TENANTS), tokens=st.integers(0, 30))
    def spend(self, gateway: int, tenant: str, tokens: int) -> None:
        self.ledgers[gateway].spend(tenant, tokens, self.now_ms)
        for period in Period:
            key = (tenant, period, period.window(self.now_ms))
            self.spent[key] = self.spent.get(key, 0) + tokens

    @rule(gateway=st.integers(0, 2), answered=st.booleans(), meanwhile=st.integers(0, 9))
    def exchange(self, gateway: int, answered: bool, meanwhile: int) -> None:
        """``answered``: False where Redis could not be reached at all."""
        if not answered:
            return
        ledger = self.ledgers[gateway]
        entries = ledger.entries(self.now_ms)
        sums = self.redis.add({entry.name: entry.tokens for entry in entries})
        self.spend(gateway, TENANTS[0], meanwhile)  # while the answer was on its way
        ledger.told(entries, sums)

    @rule(elapsed_ms=st.sampled_from((1, 1000, MINUTE_MS)))
    def pass_time(self, elapsed_ms: int) -> None:
        self.now_ms += elapsed_ms

    @rule()
    def all_exchange_and_know_everything(self) -> None:
        for tenant in TENANTS:
            for gateway in range(3):
                self.spend(gateway, tenant, 0)  # who was never asked for learns with the first
        for gateway in (0, 1, 2, 0, 1, 2):
            self.exchange(gateway, True, 0)
        for tenant in TENANTS:
            full = any(
                self.spent[tenant, period, period.window(self.now_ms)] >= bound
                for period, bound in ((Period.MINUTE, BOUND), (Period.DAY, 3 * BOUND))
            )
            for ledger in self.ledgers:
                assert (refused(ledger, tenant, self.now_ms) is not None) == full

    @invariant()
    def nobody_is_refused_who_has_something_left(self) -> None:
        for tenant in TENANTS:
            left = all(
                self.spent.get((tenant, period, period.window(self.now_ms)), 0) < bound
                for period, bound in ((Period.MINUTE, BOUND), (Period.DAY, 3 * BOUND))
            )
            if left:
                assert all(refused(each, tenant, self.now_ms) is None for each in self.ledgers)

    @invariant()
    def memory_is_bounded(self) -> None:
        assert all(len(each.entries(self.now_ms)) <= 4 for each in self.ledgers)


GatewaysMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestGateways = GatewaysMachine.TestCase


@given(
    tenants=st.lists(st.text(max_size=8), unique=True, max_size=6), now_ms=st.integers(0, 10**13)
)
def test_no_two_sums_share_a_name(tenants: list[str], now_ms: int) -> None:
    ledger = Ledger(dict.fromkeys(tenants, Quota(1, 1)))
    for tenant in tenants:
        ledger.spend(tenant, 1, now_ms)
    names = [entry.name for entry in ledger.entries(now_ms)]
    assert len(set(names)) == len(names) == 2 * len(tenants)


# ── the file and the door ────────────────────────────────────────────────────────────────────────


def test_quotas_are_in_the_file_of_keys_and_survive_its_edits(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    set_quota(file, "team", Quota(tokens_per_day=1000))
    new_key(file, "ann", tenant="team")
    remove_key(file, "ann")
    assert read_keys(file).quotas == {"team": Quota(None, 1000)}
    for bound in (0, -1, 1 << 60):
        with pytest.raises(ConfigError, match=r"quotas\.'team'\.tokens_per_min"):
            set_quota(file, "team", Quota(tokens_per_min=bound))
    assert read_keys(file).quotas == {"team": Quota(None, 1000)}
    set_quota(file, "team", NO_QUOTA)
    assert read_keys(file).quotas == {}


@pytest.mark.parametrize(
    ("quotas", "told"),
    [
        ("[]", "quotas must be an object"),
        ('{"t": 4}', "quotas.'t' is 4"),
        ('{"t": {"tokens_per_min": true}}', "tokens_per_min is True"),
        ('{"t": {"tokens_per_hour": 1}}', "'tokens_per_hour', which is none of tokens_per_min"),
    ],
)
def test_a_bad_quota_is_told_by_its_field(tmp_path: Path, quotas: str, told: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(f'{{"keys": [], "quotas": {quotas}}}')
    with pytest.raises(ConfigError, match=r"gateway\.api_keys") as error:
        read_keys(file)
    assert told in str(error.value)


class Door:
    def __init__(self, file: Path) -> None:
        self.now_ns = 0
        self.session = FakeSession(said("four"))
        keeper = Doorkeeper(
            file, clock=lambda: self.now_ns, wall_ms=lambda: self.now_ns * 1000 // S
        )
        self.ledger = keeper.ledger
        self.app = create_app(self.session, config=GatewayConfig(), doorkeeper=keeper)

    def ask(self, key: str, path: str = "/v1/completions", **fields: Any) -> Reply:
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        return ask(self.app, "POST", path, {"prompt": "123456", **fields}, headers=headers)


@pytest.mark.parametrize("stream", [False, True])
def test_all_keys_of_a_tenant_share_its_quota(
    tmp_path: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.json"
    ann, bob = (new_key(file, name, tenant="team") for name in ("ann", "bob"))
    other = new_key(file, "cid", tenant="other")
    set_quota(file, "team", Quota(tokens_per_min=20))
    door = Door(file)
    monkeypatch.setattr("pdserve.cluster.http.metrics.unix_ms", lambda: door.now_ns * 1000 // S)
    # Six tokens of the prompt, once, and four for each choice.
    assert door.ask(ann, n=2, stream=stream).status == 200
    assert [entry.tokens for entry in door.ledger.entries(0)] == [14]
    assert door.ask(bob, stream=stream).status == 200
    reply = door.ask(ann)
    assert (reply.status, reply.error()["code"]) == (429, "rate_limit_exceeded")
    assert reply.headers["retry-after"] == "60"
    assert "The tenant team has had 24 tokens this minute, of 20" in reply.error()["message"]
    assert door.ask(other).status == 200
    door.now_ns = 60 * S
    assert door.ask(bob).status == 200


def test_what_was_refused_costs_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    ann = new_key(file, "ann", tenant="team")
    set_quota(file, "team", Quota(tokens_per_day=20))
    door = Door(file)
    assert door.ask(ann, max_tokens=-1).status == 400
    assert door.ledger.entries(0) == [] or door.ledger.entries(0)[0].tokens == 0
