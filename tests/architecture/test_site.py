"""The site is built, strictly, and can be read without a network."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']([^"']+)|<link\b[^>]*\bhref=["']([^"']+)"""
)


@pytest.mark.skipif(
    importlib.util.find_spec("zensical") is None, reason="zensical is not installed"
)
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "handbook"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "No issues found" in ran.stdout + ran.stderr
    site = ROOT / "build" / "site"
    pages = sorted(site.rglob("*.html"))
    assert site / "quickstart.html" in pages
    away = {
        f"{page.relative_to(site)}: {target}"
        for page in pages
        for target in map("".join, LOADED.findall(page.read_text()))
        if target.startswith(("http:", "https:", "//"))
    }
    assert away == set()
