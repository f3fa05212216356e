"""The console in three ways; the two that need a program of the system are skipped without it."""

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from pdserve.cluster.commands.key_edits import new_key
from pdserve.cluster.gateway.access import Doorkeeper
from pdserve.cluster.gateway.audit import Audit
from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.console import PATHS
from pdserve.cluster.http.metrics import FrontMetrics
from pdserve.cluster.store_metrics import render
from pdserve.config import GatewayConfig
from pdserve.kvstore.phases import Phases
from tests.console.browser import has_looked, opened, running_chromium
from tests.integration.http_server import served
from tests.unit.cluster.fake_session import FakeSession, said
from tests.unit.cluster.test_store_metrics import report

HERE = Path(__file__).parent


def _worker(name: str, role: str) -> dict[str, Any]:
    counts = {"running": 2, "waiting": 1, "free_blocks": 60, "block_count": 100, "running_max": 8}
    duty = {"role": role, "pool": role, "duty": role}
    return {"worker": name, **duty, "pid": 1, "draining": False, **counts}


STATUS: dict[str, Any] = {
    "mode": "disaggregated",
    "workers": [_worker("p-1", "prefill"), _worker("d-1", "decode"), _worker("d-2", "decode")],
    "queue_lengths": [4, 0, 1],
    "queued_work_ms": 900,
    "oldest_wait_ms": 1500,
    "parked": 2,
    "phases": {"queued": 5},
    "counters": {},
    "prefill_tokens_per_s": 1000,
}


CHANGE = {
    "at_ms": 40_000,
    "pool": "prefill",
    "workers": 1,
    "before": 1,
    "wanted": 2,
    "demand": 1.5,
    "why": "the oldest has waited <b>1500 ms</b>",
}
SCALING: dict[str, Any] = {
    "dry_run": False,
    "pools": [
        {"pool": "prefill", "least": 1, "most": 4, "wanted": 2, "start_s": 10.0},
        {"pool": "decode", "least": 2, "most": 2, "wanted": None, "start_s": 10.0},
    ],
    "latest": [CHANGE],
    "changes": [CHANGE],
    "now_ms": 42_000,
}


SCRIPTS = ("console.js", "figures.js")


def _store_figures() -> bytes:
    return render({"s-1": report(0, Phases())}, ())


async def _stores(_: Mapping[str, Any]) -> bytes:
    return _store_figures()


async def _snapshot() -> Mapping[str, Any]:
    return STATUS


async def _scaling() -> Mapping[str, Any]:
    return SCALING


class Roles:
    """What was asked of the router; it refuses to leave nobody who prefills."""

    def __init__(self) -> None:
        self.status = deepcopy(STATUS)
        self.asked: list[tuple[str, str]] = []

    async def snapshot(self) -> Mapping[str, Any]:
        return self.status

    async def assign(self, worker: str, role: str) -> str:
        self.asked.append((worker, role))
        if worker == "p-1":
            return "p-1 is the only worker that prefills"
        (one,) = [each for each in self.status["workers"] if each["worker"] == worker]
        one["duty"] = role
        return ""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    session = FakeSession(said("Hello", " console"))
    app = create_app(
        session,
        config=GatewayConfig(),
        snapshot=_snapshot,
        stores=_stores,
        operations={"/cluster/autoscaling": _scaling},
    )
    with served(app) as url:
        yield url


def test_its_files_are_served_and_may_ask_nobody_else(url: str) -> None:
    for path in PATHS:
        with urllib.request.urlopen(url + path, timeout=10) as answer:
            assert answer.read()
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy


def test_files_are_open_and_figures_are_not(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text('{"keys": []}')
    app = create_app(
        FakeSession(), config=GatewayConfig(), snapshot=_snapshot, doorkeeper=Doorkeeper(keys)
    )
    with served(app) as url:
        with urllib.request.urlopen(f"{url}/console", timeout=10) as answer:
            assert b"<title>pdserve</title>" in answer.read()
        for path in ("/cluster/status", "/metrics", "/console/secret"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(url + path, timeout=10)
            assert caught.value.code == 401


def test_every_figure_that_it_looks_for_is_one_that_the_gateway_has() -> None:
    metrics = FrontMetrics()
    with metrics.follow("http", "chat") as meter:
        meter.status = "200"
    text = metrics.render({}) + _store_figures()
    known = set(re.findall(rb"^(pdserve_\w+)", text, re.MULTILINE))
    known |= {name.removesuffix(b"_bucket") for name in known}
    scripts = [files("pdserve.cluster.console").joinpath(name) for name in SCRIPTS]
    asked = {
        name for file in scripts for name in re.findall(rb'"(pdserve_\w+)"', file.read_bytes())
    }
    assert b"pdserve_kv_blocks_total" in asked
    assert asked <= known


def test_its_arithmetic() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    ran = subprocess.run(
        [node, "--test", HERE / "figures.test.mjs"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with running_chromium() as browser:
        yield browser


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_chromium_it_shows_the_cluster_and_chats(
    chromium: Any, url: str, scheme: str, tmp_path: Path
) -> None:
    wrong: list[str] = []
    page = opened(chromium, url, wrong, color_scheme=scheme)
    has_looked(page)
    assert page.inner_text("#queue .figure") == "5"
    assert "d-2" in page.inner_text("#decode")
    assert page.inner_text("#state") == "3 workers"
    assert page.inner_text("#phases") == "Live requests: 5 queued."
    assert not page.is_visible("#access")
    assert "found 4 from disk 4" in " ".join(page.inner_text("#stores").split())
    assert "1 to 4" in page.inner_text("#wanted")
    assert "<b>1500 ms</b>" in page.inner_text("#changes"), "text from outside is shown as text"
    assert "2.00 s" in page.inner_text("#changes")

    # By keyboard alone: the first stop skips to the chat.
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type("hi")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#life:not([hidden])")
    assert page.inner_text("#messages li.assistant") == "Hello console"
    assert "prefill 20 ms" in page.inner_text("#life-facts")

    page.reload()
    page.wait_for_selector("#requests tbody button")
    assert not page.is_visible("#life")
    page.focus("#requests tbody button")
    page.keyboard.press("Enter")
    assert "prefill 20 ms" in page.inner_text("#life-facts")
    assert page.evaluate("document.activeElement.id") == "life-title"
    assert _contrasts(page) == []
    page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
    page.close()
    assert wrong == []


CONTRAST_MIN = 4.5
"""Of text to its ground, for WCAG 2's level AA."""


def _contrasts(page: Any) -> list[str]:
    """Texts that are too faint, as the browser has computed their colours."""
    script = (HERE / "contrast.js").read_text()
    found: list[str] = page.evaluate(script[script.index("(least)") :], CONTRAST_MIN)
    return found


@pytest.mark.slow
def test_in_chromium_an_admin_drains_a_worker_by_keyboard(chromium: Any, tmp_path: Path) -> None:
    file, told = tmp_path / "keys.json", list[str]()
    ann = new_key(file, "ann", tenant="a")
    ops = new_key(file, "ops", tenant="o", admin=True)
    roles = Roles()
    app = create_app(
        FakeSession(),
        config=GatewayConfig(),
        snapshot=roles.snapshot,
        assign=roles.assign,
        doorkeeper=Doorkeeper(file, audit=Audit(told.append)),
    )
    wrong: list[str] = []
    with served(app) as url:
        page = opened(chromium, url, wrong)
        page.wait_for_selector("#access:not([hidden])")
        assert page.query_selector_all(".actions button") == [], "without a key there is nothing"
        page.fill("#key", ann)
        page.keyboard.press("Enter")
        page.wait_for_selector("#state.wrong")
        page.fill("#key", ops)
        page.keyboard.press("Enter")
        has_looked(page)
        assert page.context.cookies() == [], "a key is in no cookie"

        page.focus("#decode [data-name='d-2'] button:last-child")
        before = page.evaluate("document.body.dataset.looks")
        page.wait_for_selector(f"body:not([data-looks='{before}'])")
        focused = page.evaluate("document.activeElement.ariaLabel")
        assert focused == "d-2: drain", "a look must not take the focus away"
        page.keyboard.press("Enter")
        page.wait_for_selector("#confirm[open]")
        page.keyboard.press("Escape")
        page.wait_for_selector("#confirm:not([open])", state="hidden")
        assert roles.asked == [], "leaving it is the easy way out"
        assert page.evaluate("document.activeElement.ariaLabel") == "d-2: drain"
        page.keyboard.press("Enter")
        page.wait_for_selector("#confirm[open]")
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("#confirm:not([open])", state="hidden")
        assert roles.asked == [("d-2", "none")]
        page.wait_for_selector("#decode [data-name='d-2'] button:text-is('back to work')")
        assert "d-2: drained from now on" in page.inner_text("#acted")

        page.click("#prefill [data-name='p-1'] button:text-is('drain')")
        page.click("#confirm-yes")
        page.wait_for_selector("#confirm-wrong:has-text('only worker')")
        assert page.is_visible("#confirm")
        page.screenshot(path=tmp_path / "refused.png")
        page.close()
    lines = [json.loads(line) for line in told]
    actions = [line for line in lines if line["event"] == "action"]
    assert [(line["key"], line["worker"], line["role"], line["status"]) for line in actions] == [
        ("ops", "d-2", "none", 200),
        ("ops", "p-1", "none", 400),
    ]
    assert all(" 4" in text for text in wrong), "but for refusals nothing went wrong"
