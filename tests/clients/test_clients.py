"""Each client's program, run as its users would run it, against the HTTP and gRPC fronts on real
servers, with a session that says what a script has it say."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from pdserve.cluster.gateway.access import Doorkeeper, Key, KeyFile, digest_of, write_keys
from pdserve.cluster.gateway.calls import Call
from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.metrics import FrontMetrics
from pdserve.config import GatewayConfig
from pdserve.errors import DeadlineExceeded, PdserveError, QueueFull, RateLimited, WorkerLost
from tests.clients.matrix import CLIENTS, PROGRAMS, Client, python_of, recorded, run
from tests.integration.grpc_server import Served
from tests.integration.http_server import served
from tests.unit.cluster.fake_session import MODEL, FakeSession, Step, piece, said

pytestmark = pytest.mark.slow


def model(call: Call) -> Iterable[Step]:
    """A model that calls tools where it must, and follows schemas."""
    constraint = call.sampling.constraint
    if constraint is None:
        text = "Hello world"
    elif '"final_result"' in constraint.text:
        text = '[{"name": "final_result", "arguments": {"city": "Paris"}}]'
    elif '"add"' in constraint.text:
        text = '[{"name": "add", "arguments": {"a": 1, "b": 2}}]'
    else:
        text = '{"city": "Paris"}'
    return said(text[:4], text[4:])(call)


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
    recorded(record_property, client.package, client.what)
    said = client.run(grpc_address if client.grpc else url, MODEL)
    assert said == client.expects("Hello world")


REFUSALS: Mapping[str, tuple[PdserveError, list[object]]] = {
    "deadline": (
        DeadlineExceeded("late"),
        ["GatewayTimeoutError", "timeout_error", "deadline_exceeded", False],
    ),
    "full": (
        QueueFull("full", retry_after_ms=1500),
        ["OverloadedError", "overloaded_error", "queue_full", True],
    ),
    "gone": (WorkerLost("gone"), ["InternalServerError", "api_error", "worker_lost", False]),
    "quota": (
        RateLimited("often", retry_after_ms=1500),
        ["RateLimitError", "rate_limit_error", "rate_limit_exceeded", True],
    ),
}


def test_anthropics_library_raises_its_own_errors(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """In mid-stream too, where the status is 200 and the event says it."""
    recorded(
        record_property, "anthropic", "messages: keys in both headers; each class of its errors"
    )

    def script(call: Call) -> Iterable[Step]:
        prompt = bytes(call.prompt).decode()
        found = [error for name, (error, _) in REFUSALS.items() if name in prompt]
        late = [piece("Hel")] * ("late" in prompt)
        return [*late, found[0]] if found else said("Hello")(call)

    keys = tmp_path / "keys.json"
    write_keys(keys, KeyFile((Key("ann", "team", digest_of("secret")),)))
    config = GatewayConfig(body_bytes_max=100_000)
    app = create_app(FakeSession(script), config=config, doorkeeper=Doorkeeper(keys))
    program = PROGRAMS / "anthropic_refusals.py"
    with served(app) as url:
        said_ = run([python_of("anthropic"), program, url, "secret", MODEL, *REFUSALS])
    told = json.loads(said_)
    assert told["by bearer"] == "Hello"
    assert told["no key"] == [
        "AuthenticationError",
        "authentication_error",
        "invalid_api_key",
        False,
    ]
    assert told["too large"] == ["ContentTooLargeError", "request_too_large", "http_413", False]
    for name, (_, expected) in REFUSALS.items():
        assert told["errors"][name] == expected
        assert told["in mid stream"][name][1:3] == expected[1:3]
