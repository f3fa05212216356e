"""The console on a real cluster, in a real Chromium: what an operator sees and does there."""

from pathlib import Path

import pytest

from pdserve.cluster.commands.key_edits import new_key
from tests.console.browser import LOOK_MS, has_looked, opened, running_chromium
from tests.integration.harness import running, settings
from tests.models.small import write_small_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FIRST, SECOND = "small", "other/model"


def test_an_admin_chats_with_each_model_and_drains_a_worker(
    small_model: Path, default_model: Path, tmp_path: Path
) -> None:
    other = write_small_model(tmp_path / "other", tokenizer_from=default_model, seed=5)
    keys = tmp_path / "keys.json"
    admin = new_key(keys, "ops", tenant="o", admin=True)
    config = settings(
        small_model,
        model={"dtype": "float32", "served_name": FIRST},
        decode={"replicas": 2},
        gateway={"api_keys": str(keys)},
        models={SECOND: {"model": {"source": str(other)}}},
    )
    wrong: list[str] = []
    with running(config) as cluster, running_chromium() as chromium:
        page = opened(chromium, cluster.url, wrong)
        page.wait_for_selector("#access:not([hidden])")
        page.fill("#key", admin)
        page.keyboard.press("Enter")
        has_looked(page)
        page.wait_for_selector("#of-which:not([hidden])")

        for name in (SECOND, FIRST):
            page.select_option("#which", name)
            page.fill("#text", "Name a colour.")
            page.fill("#max", "8")
            page.click("#send")
            page.wait_for_selector("#life:not([hidden])")
            page.wait_for_selector("#send:not([disabled])")
            page.wait_for_selector(f"#requests tbody tr:has-text('{name}')")

        page.wait_for_selector(f"#decode [data-name]:has-text('({SECOND})')")
        mine = f"#decode [data-name]:has-text('({FIRST})')"
        page.locator(mine).nth(1).wait_for()  # the other one does its work
        worker = page.locator(mine).first.get_attribute("data-name")
        page.click(f"#decode [data-name='{worker}'] button:text-is('drain')")
        page.click("#confirm-yes")
        page.wait_for_selector(f"#decode [data-name='{worker}'] button:text-is('back to work')")
        assert f"{worker}: drained from now on" in page.inner_text("#acted")
        page.click(f"#decode [data-name='{worker}'] button:text-is('back to work')")
        page.click("#confirm-yes")
        page.wait_for_selector(
            f"#decode [data-name='{worker}'] button:text-is('drain')", timeout=LOOK_MS
        )
        page.screenshot(path=tmp_path / "live.png", full_page=True)
        page.close()
    assert all(" 401 " in text for text in wrong), "but for a look without a key nothing is refused"
