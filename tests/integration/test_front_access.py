"""Keys and TLS at the real ports: the SDK over HTTPS, gRPC over TLS, and who is turned away."""

import asyncio
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pdserve.cluster.commands.key_edits import new_key
from pdserve.cluster.gateway.front import Front
from pdserve.cluster.gateway.models import Control
from pdserve.cluster.gateway.session import GatewaySession
from pdserve.cluster.http_client import KEY_VARIABLE, get_json
from pdserve.config import ClusterConfig, GatewayConfig
from pdserve.errors import ConfigError, PdserveError
from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.proto.v1.inference_pb2_grpc import InferenceStub
from tests.integration.certificates import make_certificates
from tests.unit.cluster.fake_session import MODEL, FakeSession

WAIT_S = 10.0


class Served:
    """A front on ports of its own, in a thread."""

    def __init__(self, config: GatewayConfig, session: FakeSession) -> None:
        async def nothing() -> dict[str, Any]:
            return {}

        self.session = session
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.front: Front | None = None

        async def start() -> Front:
            front = Front(
                cast(GatewaySession, session),
                ClusterConfig(gateway=config),
                Control(nothing, nothing),
            )
            await front.start()
            return front

        try:
            self.front = self._run(start())
        except BaseException:
            self.stop()
            raise

    @property
    def ports(self) -> dict[str, int]:
        assert self.front is not None
        return self.front.ports

    def stop(self) -> None:
        if self.front is not None:
            self._run(self.front.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    make_certificates(directory)
    return directory


@pytest.fixture(scope="module")
def key(files: Path) -> str:
    return new_key(files / "keys.json", "ann", tenant="team")


def config_of(files: Path, **fields: Any) -> GatewayConfig:
    return GatewayConfig(
        http_port=0,
        grpc_port=0,
        api_keys=str(files / "keys.json"),
        tls_certificate=str(files / "member.pem"),
        tls_key=str(files / "member.key"),
        **fields,
    )


@pytest.fixture(scope="module")
def served(files: Path, key: str) -> Iterator[Served]:
    served = Served(config_of(files), FakeSession())
    yield served
    served.stop()


def channel(served: Served, files: Path, **files_of_client: bytes) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(
        (files / "authority.pem").read_bytes(), **files_of_client
    )
    return grpc.secure_channel(f"127.0.0.1:{served.ports['grpc']}", credentials)


def test_the_sdk_over_https(served: Served, files: Path, key: str) -> None:
    context = ssl.create_default_context(cafile=str(files / "authority.pem"))
    url = f"https://127.0.0.1:{served.ports['http']}/v1"
    with openai.DefaultHttpxClient(verify=context) as http:
        asked: Any = [{"role": "user", "content": "hi"}]
        client = openai.OpenAI(base_url=url, api_key=key, http_client=http, max_retries=0)
        answer = client.chat.completions.create(model=MODEL, messages=asked)
        assert answer.choices[0].message.content == "Hello world"
        assert served.session.calls[-1].tenant == "team"
        stranger = openai.OpenAI(base_url=url, api_key="pd-0", http_client=http, max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
            stranger.chat.completions.create(model=MODEL, messages=asked)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/models")  # an authority that it does not know


def test_our_commands_send_a_key(
    served: Served, files: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(files / "authority.pem"))
    url = f"https://127.0.0.1:{served.ports['http']}"
    with pytest.raises(PdserveError, match="No API key was sent"):
        get_json(url, "/v1/models")
    monkeypatch.setenv(KEY_VARIABLE, key)
    assert get_json(url, "/v1/models")["data"][0]["id"] == MODEL
    with pytest.raises(PdserveError, match="admin"):
        get_json(url, "/cluster/status")


def test_grpc_wants_a_key_too(served: Served, files: Path, key: str) -> None:
    known = (("authorization", f"Bearer {key}"),)
    asked = pb.GenerateRequest(text="hi")
    with channel(served, files) as connected:
        stub = InferenceStub(connected)  # type: ignore[no-untyped-call]
        chunks = list(stub.Generate(asked, metadata=known, timeout=WAIT_S))
        assert "".join(chunk.text for chunk in chunks) == "Hello world"
        assert served.session.calls[-1].tenant == "team"
        count = len(served.session.calls)
        for metadata in ((), (("authorization", "Bearer pd-0"),)):
            for call in (
                lambda m: list(stub.Generate(asked, metadata=m, timeout=WAIT_S)),
                lambda m: stub.ListModels(pb.ListModelsRequest(), metadata=m, timeout=WAIT_S),
            ):
                with pytest.raises(grpc.RpcError) as refused:
                    call(metadata)
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert len(served.session.calls) == count
        reflection = reflection_pb2_grpc.ServerReflectionStub(connected)
        wanted = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        with pytest.raises(grpc.RpcError) as refused:
            list(reflection.ServerReflectionInfo(wanted, timeout=WAIT_S))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        health = health_pb2_grpc.HealthStub(connected)
        checked = health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert checked.status == health_pb2.HealthCheckResponse.SERVING


def test_clients_show_a_certificate_where_they_must(files: Path, key: str) -> None:
    authority = files / "authority.pem"
    served = Served(config_of(files, tls_client_authority=str(authority)), FakeSession())
    try:
        url = f"https://127.0.0.1:{served.ports['http']}/health"
        context = ssl.create_default_context(cafile=str(authority))
        with pytest.raises(httpx.TransportError):
            httpx.get(url, verify=context)
        context.load_cert_chain(files / "member.pem", files / "member.key")
        assert httpx.get(url, verify=context).status_code == 200
        request = health_pb2.HealthCheckRequest()
        with channel(served, files) as connected, pytest.raises(grpc.RpcError):
            health_pb2_grpc.HealthStub(connected).Check(request, timeout=WAIT_S)
        own = {
            "private_key": (files / "member.key").read_bytes(),
            "certificate_chain": (files / "member.pem").read_bytes(),
        }
        with channel(served, files, **own) as connected:
            health_pb2_grpc.HealthStub(connected).Check(request, timeout=WAIT_S)
    finally:
        served.stop()


@pytest.mark.parametrize("damage", ["missing", "another's key"])
def test_files_that_cannot_be_used_are_named(files: Path, key: str, damage: str) -> None:
    wrong = "nowhere.key" if damage == "missing" else "authority.key"
    config = config_of(files)
    with pytest.raises(ConfigError, match=rf"tls_key .*{wrong}"):
        Served(
            GatewayConfig(
                http_port=0,
                grpc_port=0,
                tls_certificate=config.tls_certificate,
                tls_key=str(files / wrong),
            ),
            FakeSession(),
        )
