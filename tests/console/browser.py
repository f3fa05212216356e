"""The console in a real Chromium."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

LOOK_MS = 60_000


@contextmanager
def running_chromium() -> Iterator[Any]:
    """Skips the test where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("needs chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(chromium: Any, url: str, wrong: list[str], **options: Any) -> Any:
    page = chromium.new_page(viewport={"width": 1200, "height": 1000}, **options)
    page.set_default_timeout(LOOK_MS)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.extend([said.text] if said.type == "error" else []))
    page.goto(f"{url}/console")
    return page


def has_looked(page: Any) -> None:
    page.wait_for_selector("body[data-looks]:not([data-looks='1'])")
