"""Gateways, workers and router between hosts: with the certificates of the cluster, or not."""

import asyncio
import tempfile
from pathlib import Path

import pytest

from pdserve.cluster.link import RouterLink
from pdserve.cluster.router_service import RouterService
from pdserve.cluster.terms import MemoryTerms
from pdserve.ids import HostId
from pdserve.kvstore.security import Credentials
from pdserve.messages import Address, GatewayHello
from pdserve.router_config import RouterConfig
from tests.integration.certificates import make_certificates

HERE, THERE = HostId("here"), HostId("there")
START_S = 60.0
REFUSED_S = 1.5
"""Who is refused goes on trying; this long is enough to see that it is in vain."""


class Gateway:
    """On another host; reachable nowhere, and nobody tells it anything."""

    def hello(self) -> object:
        return GatewayHello(Address(THERE, "", "127.0.0.1:1"))

    def hear(self, message: object) -> None: ...
    def reconnected(self) -> None: ...


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    make_certificates(directory)
    return directory


def credentials(directory: Path, name: str = "member") -> Credentials:
    return Credentials(
        tls_authority=directory / "authority.pem",
        tls_certificate=directory / f"{name}.pem",
        tls_key=directory / f"{name}.key",
    )


async def _joins(router: Credentials, gateway: Credentials, wait_s: float) -> bool:
    service = RouterService(RouterConfig(), host=HERE, register=MemoryTerms())
    with tempfile.TemporaryDirectory(prefix="pd-", dir="/tmp") as directory:
        return await _joins_one(service, Path(directory), router, gateway, wait_s)


async def _joins_one(
    service: RouterService,
    directory: Path,
    router: Credentials,
    gateway: Credentials,
    wait_s: float,
) -> bool:
    await service.start(directory, tcp_host="127.0.0.1", credentials=router)

    async def find() -> Address:
        return service.address

    link = RouterLink(
        Gateway(), find_router=find, host=THERE, tls=gateway.ssl_context(server_side=False)
    )
    try:
        await link.start(timeout_s=wait_s)
        async with asyncio.timeout(wait_s):
            while not service._gateways:  # hello has come, and was read
                await asyncio.sleep(0.01)
    except TimeoutError:
        return False
    finally:
        await link.close()
        await service.close()
    return True


@pytest.mark.parametrize("tls", [True, False])
def test_who_has_what_the_router_has_joins(certificates: Path, tls: bool) -> None:
    own = credentials(certificates) if tls else Credentials()
    assert asyncio.run(_joins(own, own, START_S))


@pytest.mark.parametrize("name", ["", "expired"])
def test_who_has_no_good_certificate_does_not(certificates: Path, name: str) -> None:
    own = credentials(certificates, name) if name else Credentials()
    router = credentials(certificates)
    assert not asyncio.run(_joins(router, own, REFUSED_S))


def test_a_member_does_not_join_a_router_without_a_certificate(certificates: Path) -> None:
    own = credentials(certificates)
    assert not asyncio.run(_joins(Credentials(), own, REFUSED_S))
