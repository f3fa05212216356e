"""The README's code blocks do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.harness import TestCluster

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
COMMANDS = [code for language, code in BLOCKS if language == "sh"]
PROGRAMS = [code for language, code in BLOCKS if language == "python"]


def _ours(code: str, cluster: TestCluster) -> str:
    """The block with the ports and the model of the test's cluster in place of the defaults."""
    ours = {
        "http://127.0.0.1:8000": cluster.url,
        "127.0.0.1:50051": cluster.cluster.grpc,
        "smollm2-135m-instruct": "small",
    }
    for default, own in ours.items():
        code = code.replace(default, own)
    return code


def _said(command: list[str]) -> str:
    """What the command printed; it must end well and print something."""
    ran = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.strip()
    return ran.stdout


@pytest.mark.parametrize("code", [c for c in COMMANDS if "make " not in c])
def test_a_command_of_the_readme_runs(cluster: TestCluster, code: str) -> None:
    said = _said(["bash", "-euo", "pipefail", "-c", _ours(code, cluster)])
    assert '"error"' not in said


@pytest.mark.parametrize("code", PROGRAMS)
def test_a_program_of_the_readme_runs(cluster: TestCluster, code: str) -> None:
    _said([sys.executable, "-c", _ours(code, cluster)])


def test_every_target_that_the_readme_names_exists() -> None:
    named = {
        word
        for code in COMMANDS
        for line in code.splitlines()
        for word in re.findall(r"^make ([a-z-]+)", line)
    }
    assert {"serve", "demo", "test", "lint", "kernels"} <= named
    for target in named:
        planned = subprocess.run(["make", "-n", target], check=False, capture_output=True, cwd=ROOT)
        assert planned.returncode == 0, target
