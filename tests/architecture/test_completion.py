"""Completion of our commands in a real bash; the scripts for other shells, where they are there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "PATH": f"{HERE}:{os.environ['PATH']}"}

ASK_BASH = """
eval "$(pdserve completion bash)"
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_pdserve_completion pdserve
printf '%s\\n' "${{COMPREPLY[@]}}"
complete -p pdserve
"""


def run(shell: list[str], script: str) -> str:
    ran = subprocess.run(
        [*shell, script], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_bash_completes_our_commands() -> None:
    said = run(["bash", "-c"], ASK_BASH.format(words="pdserve kv st")).splitlines()
    assert said[0] == "stat"
    assert said[-1] == "complete -o default -F _pdserve_completion pdserve"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_another_shell_takes_its_script(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    run([shell, "-n", "-c"], subprocess.check_output(
        ["pdserve", "completion", shell], env=ENVIRONMENT, text=True
    ))  # fmt: skip
