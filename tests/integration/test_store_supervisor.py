"""The supervisor of a host's store, without the cluster around it."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from pdserve.cluster.store_supervisor import StoreSupervisor
from pdserve.config import StoreConfig
from pdserve.errors import ConfigError
from pdserve.ids import HostId
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.directory import SHARED, root_of
from pdserve.kvstore.masters.membership import Membership
from pdserve.kvstore.masters.metadata import EmbeddedMetadata
from pdserve.kvstore.process import REPLACED_STATUS
from pdserve.messages import Address
from pdserve.wire.hosts import local_host_id
from tests.integration.store_nodes import BLOCK_BYTES, content, filler, keys_of, read


def test_a_killed_node_gets_its_arena_again_and_a_replaced_one_another_name(
    tmp_path: Path,
) -> None:
    async def live() -> None:
        settings = StoreConfig(arena_bytes=64 << 20, master="off")
        supervisor = StoreSupervisor("test", str(tmp_path), None, settings)

        async def client_of_node() -> StoreClient:
            host, unix_path, tcp = await supervisor.ensure(BLOCK_BYTES, "unstated")
            address = Address(local_host_id(), unix_path, tcp)
            assert host == address.host
            return await asyncio.to_thread(StoreClient, address, host=local_host_id(), owner="test")

        try:
            first = await client_of_node()
            first.put(keys_of("a", 2), 0, filler("a"))
            first.close()
            (pid,) = await supervisor.pids()
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            second = await client_of_node()
            assert second.store_id == first.store_id
            assert read(second, keys_of("a", 2)) == [content("a", index) for index in range(2)]
            second.close()
            (pid,) = await supervisor.pids()
            Membership(EmbeddedMetadata(tmp_path / "members.sqlite")).join(
                second.store_id, Address(HostId("elsewhere"), "", "192.0.2.1:1")
            )
            ended = await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert ended is not None
            assert ended.si_status == REPLACED_STATUS
            assert not (root_of(SHARED) / second.store_id).exists(), "nobody goes on with it"
            third = await client_of_node()
            assert third.store_id != second.store_id
            assert read(third, keys_of("a", 2)) == []
            third.close()
            (pid,) = await supervisor.pids()
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert (root_of(SHARED) / third.store_id).exists()
        finally:
            await supervisor.stop()
        assert not (root_of(SHARED) / third.store_id).exists()

    asyncio.run(live())


def test_an_arena_of_too_many_blocks_is_refused_by_its_setting(tmp_path: Path) -> None:
    async def ask() -> None:
        supervisor = StoreSupervisor("test", str(tmp_path), None, StoreConfig(master="off"))
        try:
            with pytest.raises(ConfigError, match=r"2097152 blocks.*change store\.arena_bytes"):
                await supervisor.ensure(1024, "unstated")
            assert await supervisor.pids() == []
        finally:
            await supervisor.stop()

    asyncio.run(ask())
