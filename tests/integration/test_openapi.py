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
from fastapi import FastAPI

from pdserve.batch_config import BatchConfig
from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig
from tests.integration.http_server import served
from tests.unit.cluster.fake_session import ADAPTER, FakeSession, said

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed"
)

SEED = int(os.environ.get("SEED", "7"))

EXAMPLES = int(os.environ.get("OPENAPI_EXAMPLES", "200"))
"""Of the long test, for each operation: the surface is shown with 1,000."""

RUN_S_MAX = 3000


def application() -> FastAPI:
    async def snapshot() -> dict[str, list[object]]:
        return {"workers": []}

    session = FakeSession(said("Hello", " world"), adapters=[ADAPTER])
    many = BatchConfig(files_max=1_000_000, batches_max=1_000_000)  # nobody deletes any
    return create_app(session, config=GatewayConfig(batches=many), snapshot=snapshot)


PATHS = sorted(application().openapi()["paths"])


@pytest.fixture
def url() -> Iterator[str]:
    with served(application()) as url:
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
@pytest.mark.parametrize("path", PATHS)
def test_the_document_is_true_wherever_one_looks(url: str, path: str) -> None:
    """A path at a time: what is wrong is in one place, and what was right stays shown."""
    looks = ("--phases", "coverage,fuzzing", "--max-examples", str(EXAMPLES))
    prove(url, "--include-path", path, *looks)
