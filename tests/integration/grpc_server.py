"""A real ``grpc.aio`` server in a thread of the test process, around a scripted session."""

import asyncio
import threading
from typing import Any

from pdserve.cluster.http.metrics import FrontMetrics
from pdserve.cluster.rpc.server import GrpcServer, serve_grpc
from pdserve.config import GatewayConfig
from tests.unit.cluster.fake_session import FakeSession

WAIT_S = 10.0
CONFIG = GatewayConfig(grpc_port=0, body_bytes_max=100_000)


class Served:
    """A loop in a thread with a server on it."""

    def __init__(self, session: FakeSession, metrics: FrontMetrics) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.server: GrpcServer = self.run(serve_grpc(session, config=CONFIG, metrics=metrics))

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    def stop(self) -> None:
        self.run(self.server.stop(grace_s=0))
        self.run(_others_end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self._loop.close()


async def _others_end() -> None:
    """Waits for what the server left running: handlers that unwind, after their cancellation."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)
