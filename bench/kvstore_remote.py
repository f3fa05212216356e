"""The KV store between hosts, beside plain sockets that carry the same bytes in the same chunks.

Rows for ``bench.kvstore``, which runs them; alone:

    python -m bench.kvstore_remote [--json FILE] [--quick]

Loopback, two processes and two cores at the least. The bare peers neither verify nor copy: what is
read is sent from one buffer, what is pushed is received in one place. The hand-off is compared with
a bare sender that gathers each chunk before it is sent, as every sender of KV blocks must, and with
one that does not, for the record.
"""

import contextlib
import functools
import itertools
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bench.frame import Options, Row, at_least, at_most, interleave, row, run, skipped
from bench.kvstore_node import bare_peer, running_node
from pdserve.ids import BlockKey, HostId, RequestId
from pdserve.kvstore.claims import Claim
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.keys import block_keys, namespace_digest
from pdserve.messages import Address
from pdserve.wire.hosts import local_host_id
from pdserve.wire.tls import member_context

MiB = 1 << 20
ELSEWHERE = HostId("elsewhere")
READ_COUNT = 10  # blocks of 1 MiB in one pipelined read
PUSH_COUNT = 32  # blocks of 1 MiB in one hand-off
SMALL_BYTES = 16 << 10
LOOKUP_COUNT = 128
CALLS = 50  # short operations per sample
NAMESPACE = namespace_digest(model="bench-remote")

_BARE_PEER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
peer, _ = listener.accept()
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
size, push_count = int(sys.argv[1]), int(sys.argv[2])
block = memoryview(bytearray(size))
place = memoryview(bytearray(size * push_count))
place[:] = bytes(len(place))
while command := peer.recv(1):
    if command == b"p":
        rest = place
        while len(rest):
            rest = rest[peer.recv_into(rest[:size]):]
        peer.sendall(b"k")
    else:
        for _ in range(command[0]):
            peer.sendall(block)
"""


def keys_of(chain: int, count: int) -> tuple[BlockKey, ...]:
    return block_keys(NAMESPACE, [chain, *range(count * 16 - 1)], 16)


def seconds(action: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    action()
    return time.perf_counter() - began_s


def us_each(action: Callable[[], object]) -> float:
    """Microseconds of one call: the median of ``CALLS``."""
    return statistics.median(seconds(action) for _ in range(CALLS)) * 1e6


def receive(connected: socket.socket, outs: Sequence[memoryview]) -> None:
    connected.sendall(bytes([len(outs)]))
    for out in outs:
        rest = out
        while len(rest):
            rest = rest[connected.recv_into(rest) :]


def measure(options: Options) -> Iterator[Row]:
    yield from _reads(options)
    yield from _short(options)
    yield from _over_tls(options)
    yield from _hand_off(options)


def _client(address: Address, **more: object) -> StoreClient:
    return StoreClient(address, host=ELSEWHERE, owner="bench", **more)  # type: ignore[arg-type]


def _filled(client: StoreClient, chain: int, count: int) -> tuple[BlockKey, ...]:
    source = np.frombuffer(os.urandom(client.block_bytes), np.uint8)
    keys = keys_of(chain, count)

    def fill(_: int, out: memoryview) -> None:
        np.copyto(np.frombuffer(out, np.uint8), source)

    assert client.put(keys, 0, fill) == count
    return keys


def _outs(block_bytes: int, count: int) -> list[memoryview]:
    return [memoryview(bytearray(b"1" * block_bytes)) for _ in range(count)]


def _reads(options: Options) -> Iterator[Row]:
    outs = _outs(MiB, READ_COUNT)
    with contextlib.ExitStack() as ending:
        client = _client(
            ending.enter_context(running_node(slot_count=2 * READ_COUNT, block_bytes=MiB))
        )
        ending.callback(client.close)
        bare = ending.enter_context(bare_peer(_BARE_PEER, MiB, PUSH_COUNT))
        keys = _filled(client, 0, READ_COUNT)
        samples = interleave(
            options.rounds(40),
            one=lambda: seconds(lambda: client.fetch(keys[:1], outs[:1])) * 1e6,
            bare_one=lambda: seconds(lambda: receive(bare, outs[:1])) * 1e6,
            many=lambda: READ_COUNT * MiB / seconds(lambda: client.fetch(keys, outs)) / 1e9,
            bare_many=lambda: READ_COUNT * MiB / seconds(lambda: receive(bare, outs)) / 1e9,
        )
    yield row(
        "C5 get 1 MiB, TCP, verified",
        samples["one"],
        "µs",
        reference="bare TCP",
        reference_samples=samples["bare_one"],
        bar=at_most(400),
    )
    yield row(
        "C5 get 10 x 1 MiB pipelined, TCP, verified",
        samples["many"],
        "GB/s",
        reference="bare TCP",
        reference_samples=samples["bare_many"],
        bar=at_least(2.2),
    )


def _short(options: Options) -> Iterator[Row]:
    (out,) = _outs(SMALL_BYTES, 1)
    with contextlib.ExitStack() as ending:
        address = ending.enter_context(
            running_node(slot_count=2 * LOOKUP_COUNT, block_bytes=SMALL_BYTES)
        )
        tcp = _client(address)
        unix = StoreClient(address, host=local_host_id(), owner="bench", shared_memory=False)
        ending.callback(tcp.close)
        ending.callback(unix.close)
        bare = ending.enter_context(bare_peer(_BARE_PEER, SMALL_BYTES, PUSH_COUNT))
        keys = _filled(tcp, 0, LOOKUP_COUNT)

        def look_up(client: StoreClient) -> float:
            claims: list[Claim] = []
            each_us = us_each(lambda: claims.append(client.claim(keys)))
            for claim in claims:
                assert claim.count == LOOKUP_COUNT
                client.release(claim)
            return each_us

        samples = interleave(
            options.rounds(30),
            unix=lambda: us_each(lambda: unix.fetch(keys[:1], [out])),
            tcp=lambda: us_each(lambda: tcp.fetch(keys[:1], [out])),
            bare=lambda: us_each(lambda: receive(bare, [out])),
            look_unix=lambda: look_up(unix),
            look_tcp=lambda: look_up(tcp),
        )
    compared = functools.partial(row, reference="bare TCP", reference_samples=samples["bare"])
    yield compared("C6 get 16 KiB, Unix socket, verified", samples["unix"], "µs", bar=at_most(80))
    yield compared("C6 get 16 KiB, TCP, verified", samples["tcp"], "µs", bar=at_most(90))
    claim = f"C9 lookup and pin of {LOOKUP_COUNT} blocks, "
    yield row(claim + "Unix socket", samples["look_unix"], "µs", bar=at_most(120))
    yield row(claim + "TCP", samples["look_tcp"], "µs", bar=at_most(160))


def _over_tls(options: Options) -> Iterator[Row]:
    name = "C22 get 10 x 1 MiB, mutual TLS, verified"
    openssl = shutil.which("openssl")
    if openssl is None:
        yield skipped(name, "GB/s", "no openssl command to make certificates with")
        return
    outs = _outs(MiB, READ_COUNT)
    with contextlib.ExitStack() as ending:
        directory = Path(ending.enter_context(tempfile.TemporaryDirectory()))
        certificate, key = directory / "own.pem", directory / "own.key"
        command = (
            f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 "
            f"-subj /CN=bench -keyout {key} -out {certificate}"
        )
        subprocess.run(command.split(), check=True, capture_output=True)
        arguments = (
            *("--tls-authority", str(certificate), "--tls-certificate", str(certificate)),
            *("--tls-key", str(key)),
        )
        context = member_context(
            certificate=certificate, key=key, authority=certificate, server_side=False
        )
        address = ending.enter_context(
            running_node(*arguments, slot_count=2 * READ_COUNT, block_bytes=MiB)
        )
        client = _client(address, ssl_context=context)
        ending.callback(client.close)
        bare = ending.enter_context(bare_peer(_BARE_PEER, MiB, PUSH_COUNT))
        keys = _filled(client, 0, READ_COUNT)
        samples = interleave(
            options.rounds(20),
            ours=lambda: READ_COUNT * MiB / seconds(lambda: client.fetch(keys, outs)) / 1e9,
            bare=lambda: READ_COUNT * MiB / seconds(lambda: receive(bare, outs)) / 1e9,
        )
    yield row(
        name,
        samples["ours"],
        "GB/s",
        reference="bare TCP, plain",
        reference_samples=samples["bare"],
        bar=at_least(0.8),
    )


def _hand_off(options: Options) -> Iterator[Row]:
    pool = [np.frombuffer(os.urandom(MiB), np.uint8) for _ in range(PUSH_COUNT)]
    views = [memoryview(bytearray(block.tobytes())) for block in pool]
    staging = memoryview(bytearray(MiB))
    chains = itertools.count(1)
    with contextlib.ExitStack() as ending:
        client = _client(
            ending.enter_context(running_node(slot_count=3 * PUSH_COUNT, block_bytes=MiB))
        )
        ending.callback(client.close)
        bare = ending.enter_context(bare_peer(_BARE_PEER, MiB, PUSH_COUNT))

        def gather(index: int, out: memoryview) -> None:
            np.copyto(np.frombuffer(out, np.uint8), pool[index])

        def hand_off() -> float:
            keys = keys_of(next(chains), PUSH_COUNT)
            began_s = time.perf_counter()
            ticket = client.open_ticket(
                RequestId("r"), 0, reader="bench", block_count=PUSH_COUNT, wait_ms=1000
            )
            client.push(ticket, keys, 0, gather)
            client.seal(ticket)
            elapsed_s = time.perf_counter() - began_s
            client.release(client.adopt(ticket))
            return PUSH_COUNT * MiB / elapsed_s / 1e9

        def bare_push(*, gathers: bool) -> float:
            began_s = time.perf_counter()
            bare.sendall(b"p")
            for index, view in enumerate(views):
                if gathers:
                    gather(index, staging)
                bare.sendall(staging if gathers else view)
            assert bare.recv(1) == b"k"
            return PUSH_COUNT * MiB / (time.perf_counter() - began_s) / 1e9

        for _ in range(4):  # every slot touched
            hand_off()
        samples = interleave(
            options.rounds(30),
            ours=hand_off,
            gathers=lambda: bare_push(gathers=True),
            bare=lambda: bare_push(gathers=False),
        )
    name = f"C23 hand-off of {PUSH_COUNT} x 1 MiB, TCP, verified"
    yield row(
        name,
        samples["ours"],
        "GB/s",
        reference="bare TCP, same chunks, gathered",
        reference_samples=samples["gathers"],
        bar=at_least(0.75, of="ratio"),
    )
    yield row(
        name + ", beside a sender that gathers nothing",
        samples["ours"],
        "GB/s",
        reference="bare TCP, same chunks",
        reference_samples=samples["bare"],
    )


if __name__ == "__main__":
    run("kvstore_remote", measure)
