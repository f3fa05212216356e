"""Each client's program, run as its users would run it, against the HTTP and gRPC fronts on real
servers, with a session that says what a script has it say."""

from collections.abc import Callable, Iterable, Iterator

import pytest

from pdserve.cluster.calls import Call
from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.metrics import FrontMetrics
from pdserve.config import GatewayConfig
from tests.clients.matrix import CLIENTS, Client, recorded
from tests.integration.grpc_server import Served
from tests.integration.http_server import served
from tests.unit.cluster.fake_session import MODEL, FakeSession, Step, said

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
