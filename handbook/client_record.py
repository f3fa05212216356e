"""A plugin of pytest that keeps what the tests of clients have shown, for the compatibility table.

    CLIENTS_REPORT=docs/clients.json python -m pytest -p handbook.client_record tests/clients

Every test of a client that ran enters its row, in the place of the one that an earlier run entered;
a test that was skipped leaves what is there. Without ``CLIENTS_REPORT`` nothing is written. A test
may name its client and what it shows, with ``record_property("client", "litellm")``; else its name,
or that of its file, says it.
"""

import datetime
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

REPORT_ENV = "CLIENTS_REPORT"
ENVIRONMENTS = Path(".venv-clients")


@dataclass(frozen=True, slots=True, order=True)
class Row:
    client: str
    shows: str
    test: str
    passed: bool
    version: str
    date: str


class Recorder:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._rows: list[Row] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or report.outcome == "skipped":
            return
        today = f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}"
        row = row_of(report.nodeid, dict(report.user_properties), report.passed, today)
        if row is not None:
            self._rows.append(row)

    def pytest_sessionfinish(self) -> None:
        rows = [asdict(row) for row in merged(read_rows(self._file), self._rows)]
        self._file.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if path := os.environ.get(REPORT_ENV):
        config.pluginmanager.register(Recorder(Path(path)), "client-record")


def read_rows(file: Path) -> list[Row]:
    return [Row(**entry) for entry in json.loads(file.read_text())] if file.exists() else []


def merged(kept: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """By test; what is new counts, and of several cases of a test in one run the worst."""
    latest: dict[str, Row] = {}
    for row in new:
        earlier = latest.get(row.test, row)
        latest[row.test] = replace(row, passed=row.passed and earlier.passed)
    return sorted(({row.test: row for row in kept} | latest).values())


def row_of(test: str, said: Mapping[str, object], passed: bool, date: str) -> Row | None:
    """None for a test that is no client's: neither its name nor the test itself says which."""
    whole, _, case = test.removesuffix("]").partition("[")
    file, _, function = whole.rpartition("::")
    named = client_of(case) or client_of(function) or client_of(file)
    client = str(said.get("client") or named)
    if not client:
        return None
    return Row(
        client=client,
        shows=str(said.get("shows") or function.removeprefix("test_").replace("_", " ")),
        test=test if client_of(case) else whole,
        passed=passed,
        version=str(said.get("version") or version_of(client)),
        date=date,
    )


CLIENTS = {
    "anthropic": "anthropic",
    "pydantic_ai": "pydantic-ai-slim",
    "langchain": "langchain-openai",
    "litellm": "litellm",
    "vllm_bench": "vllm",
    "guidellm": "guidellm",
    "aiperf": "aiperf",
    "lm_eval": "lm-eval",
    "openai": "openai",
    "reflection": "grpcio-reflection",
    "triton": "tritonclient",
    "kserve": "tritonclient",
    "grpc": "grpcio",
}
"""A word in the name of a test or of its file, and the package that such a client is."""


def client_of(words: str) -> str:
    words = words.replace("-", "_")
    return next((package for word, package in CLIENTS.items() if word in words), "")


def version_of(package: str) -> str:
    """In the environment of `make clients` whose name the package's begins with; else beside us;
    nothing where it is in neither. What other clients bring of it has a version of theirs."""
    for found in _found(package):
        return found.version
    return ""


def _found(package: str) -> Iterator[importlib.metadata.Distribution]:
    own = [
        place
        for place in sorted(ENVIRONMENTS.glob("*/lib/python*/site-packages"))
        if package.replace("-", "_").startswith(place.relative_to(ENVIRONMENTS).parts[0])
    ]
    yield from importlib.metadata.distributions(name=package, path=[str(path) for path in own])
    yield from importlib.metadata.distributions(name=package)
