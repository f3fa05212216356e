"""How long a request is with the router while a worker is idle: the real router service and real
sockets, between a gateway and two workers that do nothing.

The clock runs from before the gateway's frame is encoded until the worker's is decoded: two hops
over Unix sockets and the decision between them. All of them share one event loop here, so this is
what the router adds at most. ``Timing.queued_us`` cannot say it: it counts time in the queue, and
with an idle worker there is none.
"""

import asyncio
import tempfile
import time
from pathlib import Path

from pdserve.cluster.router_service import RouterService
from pdserve.cluster.terms import MemoryTerms
from pdserve.ids import BlockKey, HostId, RequestId, StoreId, WorkerId
from pdserve.messages import (
    Address,
    Cancel,
    Dispatch,
    GatewayHello,
    Hello,
    Report,
    Request,
    Role,
    Sampling,
    ServiceClass,
    Stop,
    Submit,
)
from pdserve.router_config import RouterConfig
from pdserve.wire.connection import Connection, connect

HOST = HostId("here")
NOWHERE = Address(HOST, "/nowhere", "")
BLOCK_TOKENS = 16
PROMPT_TOKENS = 1024
WARM_UP_ROUNDS = 20


def dispatch_ms(rounds: int) -> list[float]:
    """From a gateway's submission to the worker that gets it, once per round."""
    return asyncio.run(_rounds(rounds))


async def _rounds(rounds: int) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="pd-") as directory:
        service = RouterService(RouterConfig(), host=HOST, register=MemoryTerms())
        address = await service.start(Path(directory), tcp_host=None)
        while not service.leads:
            await asyncio.sleep(0.001)
        workers = [await _worker(address, role) for role in (Role.PREFILL, Role.DECODE)]
        gateway = await connect(address, host=HOST)
        await gateway.send(GatewayHello(NOWHERE))
        samples = [
            await _round(gateway, workers, index) for index in range(WARM_UP_ROUNDS + rounds)
        ]
        for connection in (*workers, gateway):
            await connection.close()
        await service.close()
    return samples[WARM_UP_ROUNDS:]


async def _round(gateway: Connection, workers: list[Connection], index: int) -> float:
    prefill, _ = workers
    request = _request(index)
    begun_s = time.perf_counter()
    await gateway.send(Submit(request))
    dispatch = (await prefill.receive()).message
    taken_ms = (time.perf_counter() - begun_s) * 1000
    assert isinstance(dispatch, Dispatch), dispatch
    await gateway.send(Cancel(request.request))  # so that the next one finds the worker idle, too
    for worker in workers:
        cancel = (await worker.receive()).message
        assert isinstance(cancel, Cancel), cancel
    return taken_ms


async def _worker(router: Address, role: Role) -> Connection:
    connection = await connect(router, host=HOST)
    worker = WorkerId(f"{role}-0")
    await connection.send(
        Hello(
            worker=worker,
            role=role,
            address=NOWHERE,
            store_id=StoreId("store"),
            store=NOWHERE,
            namespace="00",
            block_tokens=BLOCK_TOKENS,
            block_count=1 << 16,
            running_max=64,
            chunk_tokens=256,
            pid=0,
        )
    )
    await connection.send(Report(worker, 0, False, running=0, waiting=0, free_blocks=1 << 16))
    return connection


def _request(index: int) -> Request:
    blocks = range(PROMPT_TOKENS // BLOCK_TOKENS)
    return Request(
        request=RequestId(f"r{index}"),
        attempt=0,
        choice=0,
        model="m",
        tokens=tuple(range(PROMPT_TOKENS)),
        prompt_tokens=PROMPT_TOKENS,
        block_keys=tuple(BlockKey(f"{index:08}{block:08}".encode()) for block in blocks),
        tenant="",
        service_class=ServiceClass.STANDARD,
        sampling=Sampling(),
        stop=Stop(max_tokens=16),
        seed=0,
        deadline_unix_ms=time.time_ns() // 1_000_000 + 600_000,
        reply_to=NOWHERE,
    )
