"""Each client's program, run as its users would run it, against the HTTP front on a real server."""

import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pdserve.cluster.calls import Call
from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig
from tests.integration.http_server import served
from tests.unit.cluster.fake_session import MODEL, FakeSession, Step, said

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".venv-clients"
PROGRAMS = Path(__file__).parent / "programs"

RUN_S_MAX = 240

pytestmark = pytest.mark.slow

ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


def model(call: Call) -> Iterable[Step]:
    """A model that calls tools where it has some, and follows schemas."""
    prompt = bytes(call.prompt).decode()
    constraint = call.sampling.constraint
    if constraint is not None and "final_result" in constraint.text:
        text = '[{"name": "final_result", "arguments": {"city": "Paris"}}]'
    elif constraint is not None:
        text = '{"city": "Paris"}'
    elif "tool: 3" in prompt:
        text = "It is 3."
    elif prompt.startswith("tools "):
        text = ADD
    else:
        text = "Hello world"
    return said(text[:4], text[4:])(call)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(create_app(FakeSession(model), config=GatewayConfig())) as url:
        yield f"{url}/v1"


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (
            "litellm_client",
            {
                "whole": "Hello world",
                "cached": 3,
                "streamed": "Hello world",
                "call": {"a": 1, "b": 2},
                "too_long": True,
                "response": "Hello world",
            },
        ),
        (
            "langchain_client",
            {
                "looped": "It is 3.",
                "streamed": "Hello world",
                "structured": "Paris",
                "response": "It is 3.",
            },
        ),
        (
            "pydantic_ai_client",
            {"looped": "It is 3.", "typed": "Paris", "response": "It is 3."},
        ),
    ],
)
def test_an_unchanged_client_works(url: str, program: str, says: dict[str, Any]) -> None:
    python = ENVIRONMENTS / program.removesuffix("_client") / "bin" / "python"
    if not python.exists():
        pytest.skip("make clients installs them")
    run = subprocess.run(
        [str(python), str(PROGRAMS / f"{program}.py"), url, MODEL],
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == says
