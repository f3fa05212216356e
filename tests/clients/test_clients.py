"""Each client's program, run as its users would run it, against the HTTP front on a real server."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pdserve.cluster.calls import Call
from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.metrics import FrontMetrics
from pdserve.config import GatewayConfig
from tests.integration.grpc_server import Served
from tests.integration.http_server import served
from tests.unit.cluster.fake_session import MODEL, FakeSession, Step, said

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".venv-clients"
PROGRAMS = Path(__file__).parent / "programs"

RUN_S_MAX = 240

VERSIONS = {
    "openai": "openai",
    "litellm": "litellm",
    "langchain": "langchain-openai",
    "pydantic-ai": "pydantic-ai-slim",
    "tritonclient": "tritonclient",
}
"""The distribution of a client, whose version the compatibility table has."""

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


@dataclass(frozen=True, slots=True)
class Client:
    """A program of a client's user, and what it must print."""

    package: str
    what: str
    says: dict[str, Any]
    grpc: bool = False

    @property
    def program(self) -> Path:
        return PROGRAMS / f"{self.package.replace('-', '_')}_client.py"

    @property
    def python(self) -> Path:
        """OpenAI's library is among our own tools."""
        if self.package == "openai":
            return Path(sys.executable)
        return ENVIRONMENTS / self.package.replace("-", "_") / "bin" / "python"


CLIENTS = (
    Client(
        "openai",
        "chat: whole, async, streamed, cancelled, tools, parsed schema; responses; refusals",
        {
            "models": [MODEL],
            "whole": "Hello world",
            "async": "Hello world",
            "streamed": "Hello world",
            "cancelled_after": "Hell",
            "call": {"a": 1, "b": 2},
            "parsed": "Paris",
            "response": "Hello world",
            "refused": "max_tokens",
        },
    ),
    Client(
        "litellm",
        "whole, streamed, usage, tools, a prompt that is too long, responses",
        {
            "whole": "Hello world",
            "cached": 3,
            "streamed": "Hello world",
            "call": {"a": 1, "b": 2},
            "too_long": True,
            "response": "Hello world",
        },
    ),
    Client(
        "langchain",
        "a loop with tools, streamed, structured output, responses",
        {
            "looped": "It is 3.",
            "streamed": "Hello world",
            "structured": "Paris",
            "response": "It is 3.",
        },
    ),
    Client(
        "pydantic-ai",
        "a loop with tools, typed output, responses",
        {"looped": "It is 3.", "typed": "Paris", "response": "It is 3."},
    ),
    Client(
        "tritonclient",
        "gRPC: metadata, infer, stream_infer, refusals",
        {
            "live": True,
            "ready": True,
            "inputs": True,
            "config": True,
            "whole": "Hello world",
            "refused": ["StatusCode.INVALID_ARGUMENT", True],
            "streamed": "Hello world",
        },
        grpc=True,
    ),
)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(create_app(FakeSession(model), config=GatewayConfig())) as url:
        yield f"{url}/v1"


@pytest.fixture(scope="module")
def grpc_address() -> Iterator[str]:
    served = Served(FakeSession(model), FrontMetrics())
    yield f"127.0.0.1:{served.server.port}"
    served.stop()


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.package)
def test_an_unchanged_client_works(
    url: str, grpc_address: str, client: Client, record_property: Callable[[str, object], None]
) -> None:
    if not client.python.exists():
        pytest.skip("make clients installs them")
    record_property("client", VERSIONS[client.package])
    record_property("shows", client.what)
    run = subprocess.run(
        [str(client.python), str(client.program), grpc_address if client.grpc else url, MODEL],
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == client.says
