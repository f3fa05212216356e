"""What the page on the HTTP API shows is typed into a shell, and works."""

import re
import subprocess
from pathlib import Path

import pytest

from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig
from tests.clients.test_clients import model
from tests.integration.http_server import served
from tests.unit.cluster.fake_session import FakeSession

PAGE = Path(__file__).parents[2] / "docs" / "http.md"
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.M | re.S)
DEFAULT = "http://127.0.0.1:8000"


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_an_example_works(code: str, tmp_path: Path) -> None:
    assert DEFAULT in code
    with served(create_app(FakeSession(model), config=GatewayConfig())) as url:
        shell = ["bash", "-euo", "pipefail", "-c", code.replace(DEFAULT, url)]
        said = subprocess.check_output(shell, text=True, cwd=tmp_path, timeout=240)
    assert len(said) > len("{}")
    assert '"error": {' not in said
