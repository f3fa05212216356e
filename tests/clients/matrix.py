"""Clients' programs and what they print, whatever the model: where a model may choose its words, a
program prints what the server gives for the same request."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".venv-clients"
PROGRAMS = Path(__file__).parent / "programs"

RUN_S_MAX = 900
TEST_S_MAX = 2 * RUN_S_MAX
"""The start of a cluster comes on top, and what is compared. vLLM's program takes half a minute of
processor time before it begins."""

TEXT = "<the answer>"
"""What the model says, greedily, in 12 tokens: of a chat to "hi"; over gRPC, as "hi" goes on."""

CALLS = {"a": 1, "b": 2}


@dataclass(frozen=True, slots=True)
class Client:
    """A program of a client's user, and what it must print.

    Attributes:
        environment: in ``.venv-clients``, and the beginning of the program's name.
        package: its distribution, whose version the compatibility table has.
    """

    environment: str
    package: str
    what: str
    says: Mapping[str, Any]
    grpc: bool = False

    @property
    def program(self) -> Path:
        return PROGRAMS / f"{self.environment}_client.py"

    def run(self, address: str, model: str) -> Any:
        """What it prints, with a server at ``address``: a URL that ends with ``/v1``, or, for
        gRPC, a host and a port."""
        said = run([python_of(self.environment), self.program, address, model])
        return json.loads(said.splitlines()[-1])

    def expects(self, text: str) -> dict[str, Any]:
        """What it must print where the model says ``text``."""
        said: dict[str, Any] = _with_text(dict(self.says), text)
        return said


def _with_text(value: Any, text: str) -> Any:
    """``value`` with ``text`` wherever it has ``TEXT``."""
    if isinstance(value, dict):
        return {key: _with_text(each, text) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_text(each, text) for each in value]
    return text if value == TEXT else value


CLIENTS = (
    Client(
        "openai",
        "openai",
        "chat: whole, async, streamed, cancelled, tools whole and streamed, parsed schema, refusal;"
        " responses: whole, in the background and resumed with starting_after; decisions; files and"
        " batches",
        {
            "served": True,
            "whole": TEXT,
            "async": TEXT,
            "streamed": TEXT,
            "cancelled": True,
            "calls": [CALLS, CALLS],
            "parsed": "Paris",
            "response": TEXT,
            "resumed": TEXT,
            "refused": "max_tokens",
            "decided": ["predicate", "choice", "score"],
            "shared": True,
            "batched": [["a", TEXT], ["b", TEXT]],
            "failed": [["c", "max_tokens"]],
        },
    ),
    Client(
        "anthropic",
        "anthropic",
        "models; messages: whole, async, streamed, cancelled, a loop with tools whole and streamed,"
        " parsed schema, counted tokens, its classes of errors",
        {
            "whole": TEXT,
            "async": TEXT,
            "streamed": TEXT,
            "cancelled": True,
            "counted": True,
            "listed": ["model", True],
            "calls": [CALLS, CALLS],
            "parsed": "Paris",
            "refused": "BadRequestError invalid_field",
            "unknown": "NotFoundError model_not_found",
        },
    ),
    Client(
        "litellm",
        "litellm",
        "whole, streamed, usage, tools, a prompt that is too long, responses, rerank, decisions",
        {
            "whole": TEXT,
            "counted": True,
            "streamed": TEXT,
            "call": CALLS,
            "too_long": True,
            "response": TEXT,
            "ranked": [2, True],
            "decided": ["predicate", "choice"],
            "shared": True,
        },
    ),
    Client(
        "langchain",
        "langchain-openai",
        "a loop with tools by both APIs, streamed with usage, structured output, responses",
        {
            "looped": [[CALLS], "3", True],
            "looped by responses": [[CALLS], "3", True],
            "streamed": TEXT,
            "counted": True,
            "structured": "Paris",
            "response": TEXT,
        },
    ),
    Client(
        "pydantic_ai",
        "pydantic-ai-slim",
        "a loop with tools and a typed answer, and a plain one, by both APIs",
        {
            "looped": [[CALLS], "Paris"],
            "looped by responses": [[CALLS], "Paris"],
            "said": TEXT,
            "response": TEXT,
        },
    ),
    Client(
        "tritonclient",
        "tritonclient",
        "gRPC: metadata, infer, stream_infer, refusals",
        {
            "live": True,
            "ready": True,
            "inputs": True,
            "config": True,
            "whole": TEXT,
            "refused": ["StatusCode.INVALID_ARGUMENT", True],
            "streamed": TEXT,
        },
        grpc=True,
    ),
)


def python_of(environment: str) -> Path:
    """Skips the test where it is not installed. OpenAI's library is among our own tools."""
    if environment == "openai":
        return Path(sys.executable)
    python = ENVIRONMENTS / environment / "bin" / "python"
    if not python.exists():
        pytest.skip("make clients installs them")
    return python


def script_of(environment: str, name: str) -> Path:
    """A command that the client's package brings."""
    return python_of(environment).with_name(name)


def run(command: Sequence[str | Path], *, more: Mapping[str, str] = MappingProxyType({})) -> str:
    """What it printed, with ``more`` in its environment; fails with all of it where it does not
    end well."""
    ran = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        check=False,
        env={**os.environ, **more},
    )
    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-20_000:]
    return ran.stdout


def recorded(record_property: Callable[[str, object], None], package: str, shows: str) -> None:
    """For the compatibility table."""
    record_property("client", package)
    record_property("shows", shows)
