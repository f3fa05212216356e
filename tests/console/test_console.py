"""The console in three ways; the two that need a program of the system are skipped without it."""

import shutil
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pdserve.cluster.access import Doorkeeper
from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.console import PATHS
from pdserve.config import GatewayConfig
from tests.integration.http_server import served
from tests.unit.cluster.fake_session import FakeSession, said

HERE = Path(__file__).parent
LOOK_MS = 20_000


def _worker(name: str, role: str) -> dict[str, Any]:
    counts = {"running": 2, "waiting": 1, "free_blocks": 60, "block_count": 100, "running_max": 8}
    return {"worker": name, "role": role, "pid": 1, "draining": False, **counts}


STATUS: dict[str, Any] = {
    "workers": [_worker("p-1", "prefill"), _worker("d-1", "decode"), _worker("d-2", "decode")],
    "queue_lengths": [4, 0, 1],
    "queued_work_ms": 900,
    "oldest_wait_ms": 1500,
    "parked": 2,
    "phases": {"queued": 5},
    "counters": {},
    "prefill_tokens_per_s": 1000,
}


async def _snapshot() -> Mapping[str, Any]:
    return STATUS


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    session = FakeSession(said("Hello", " console"))
    with served(create_app(session, config=GatewayConfig(), snapshot=_snapshot)) as url:
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


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_chromium_it_shows_the_cluster_and_chats(url: str, scheme: str, tmp_path: Path) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=scheme, viewport={"width": 1200, "height": 1000})
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.extend([said.text] if said.type == "error" else []))
        page.goto(f"{url}/console")
        page.wait_for_selector("body[data-looks]:not([data-looks='1'])", timeout=LOOK_MS)
        assert page.inner_text("#queue .figure") == "5"
        assert "d-2" in page.inner_text("#decode")
        assert page.inner_text("#state") == "3 workers"
        assert not page.is_visible("#access")

        # By keyboard alone: the first stop skips to the chat.
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.type("hi")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("#life:not([hidden])", timeout=LOOK_MS)
        assert page.inner_text("#messages li.assistant") == "Hello console"
        assert "prefill 20 ms" in page.inner_text("#life-facts")
        page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
        browser.close()
    assert wrong == []
