"""Schemathesis reads our OpenAPI document and tries to prove it wrong, with data that follows it
and data that does not: no error of the server, no answer that the document does not know, nothing
accepted that it forbids, nothing refused that it allows."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig
from tests.integration.http_server import served
from tests.unit.cluster.fake_session import ADAPTER, FakeSession, said

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed"
)

SEED = int(os.environ.get("SEED", "7"))

RUN_S_MAX = 3000


@pytest.fixture
def url() -> Iterator[str]:
    async def snapshot() -> dict[str, list[object]]:
        return {"workers": []}

    session = FakeSession(said("Hello", " world"), adapters=[ADAPTER])
    with served(create_app(session, config=GatewayConfig(), snapshot=snapshot)) as url:
        yield url


def prove(url: str, *options: str) -> None:
    print(f"seed {SEED}; SEED=… takes another")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
        *("--mode", "all", "--seed", str(SEED), "--no-color", "--continue-on-failure"),
        *("--exclude-checks", "positive_data_acceptance"),  # ours knows what no schema can say
        *("--suppress-health-check", "all", "--request-timeout", "60"),
        *options,
    ]
    here = Path(__file__).parent
    paths = [str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": "schemathesis_checks",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=RUN_S_MAX, check=False
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2000:]


def test_the_document_is_true(url: str) -> None:
    prove(url, "--phases", "fuzzing", "--max-examples", "5")


@pytest.mark.slow
@pytest.mark.timeout(RUN_S_MAX)
def test_the_document_is_true_wherever_one_looks(url: str) -> None:
    prove(url, "--phases", "coverage,fuzzing", "--max-examples", "200")
