import pytest

from pdserve.cluster.commands.helping_cli import SHELLS, completion_script
from pdserve.errors import ConfigError


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script_that_asks_us(shell: str) -> None:
    script = completion_script(shell)
    assert f"_PDSERVE_COMPLETE=complete_{shell}" in script
    assert "pdserve" in script


def test_a_shell_that_we_do_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="'tcsh', must be one of bash, zsh, fish"):
        completion_script("tcsh")
