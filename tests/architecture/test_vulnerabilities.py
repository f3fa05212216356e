"""No installed package has a known vulnerability. ``make lint`` asks the package index for them;
tests alone ask nobody."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

ASK_S_MAX = 240.0


@dataclass(frozen=True)
class Audit:
    answered: int  # packages of which the index knew what is known
    vulnerable: Mapping[str, Sequence[str]]  # "name version": identifiers, and where it is mended


def read(report: Mapping[str, Any]) -> Audit:
    """``pip-audit`` ends well, and says that nothing was found, where nobody answered it: each
    package is then one that it skipped."""
    answers = [package for package in report["dependencies"] if "skip_reason" not in package]
    vulnerable = {
        f"{package['name']} {package['version']}": [
            f"{found['id']}, mended in {' or '.join(found['fix_versions']) or 'no release'}"
            for found in package["vulns"]
        ]
        for package in answers
        if package["vulns"]
    }
    return Audit(len(answers), vulnerable)


@pytest.mark.timeout(ASK_S_MAX + 30)
@pytest.mark.skipif(os.environ.get("ADVISORIES") != "ask", reason="make lint asks for advisories")
def test_no_installed_package_has_a_known_vulnerability() -> None:
    command = [
        *(sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"),
        *("--skip-editable", "--path", sysconfig.get_path("purelib")),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S_MAX, check=False)
    if not run.stdout:
        pytest.skip(f"nothing was looked up: {run.stderr[-300:]}")
    audit = read(json.loads(run.stdout))
    if not audit.answered:
        pytest.skip("nothing was looked up: the package index has no advisories")
    assert audit.vulnerable == {}


def test_who_was_skipped_was_not_looked_up() -> None:
    skipped = {"name": "idna", "skip_reason": "Dependency not found on PyPI"}
    assert read({"dependencies": [skipped]}) == Audit(0, {})


def test_an_advisory_is_named_with_the_release_that_mends_it() -> None:
    known = {"id": "PYSEC-2024-60", "fix_versions": ["3.7"], "aliases": [], "description": ""}
    unmended = {"id": "GHSA-0000", "fix_versions": [], "aliases": [], "description": ""}
    packages = [
        {"name": "idna", "version": "3.6", "vulns": [known, unmended]},
        {"name": "attrs", "version": "26.1", "vulns": []},
    ]
    said = ["PYSEC-2024-60, mended in 3.7", "GHSA-0000, mended in no release"]
    assert read({"dependencies": packages}) == Audit(2, {"idna 3.6": said})
