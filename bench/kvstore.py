"""The KV store: blocks in and out, beside plain copies and plain sockets of the same run.

    python -m bench.kvstore [--json FILE] [--quick]
    python -m bench.kvstore --gpu [--json FILE] [--quick]      on a GPU: see ``kvstore_gpu``

One node process and one client, blocks of the default model (16 tokens of SmolLM2 in bf16). What a
copy is compared with goes through as much memory as the arena has, warm; what goes over a socket is
compared with a bare request and answer of the same size between two processes. Keys and the end of
a hand-off are in ``kvstore_handoff``.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator

import numpy as np

from bench import kvstore_gpu, kvstore_master, kvstore_remote
from bench.frame import Options, Row, at_least, at_most, interleave, row, run
from bench.kvstore_handoff import NODE_SLOTS, chain_rows, handoff_rows
from bench.kvstore_local import measure_local
from bench.kvstore_node import BLOCK_BYTES, bare_peer, running_node
from bench.kvstore_ssd import measure_ssd
from bench.kvstore_tables import measure_tables
from pdserve.ids import BlockKey, HostId
from pdserve.kvstore.claims import Claim
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.keys import block_keys, namespace_digest
from pdserve.wire.hosts import local_host_id

BLOCK_COUNT = 94  # a prompt of 1,500 tokens
BLOCK_TOKENS = 16
SLOT_COUNT = 4 * BLOCK_COUNT
NAMESPACE = namespace_digest(model="bench")

_BARE_PEER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
peer, _ = listener.accept()
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
block = bytes(int(sys.argv[1]))
while peer.recv(64):
    peer.sendall(block)
"""


def keys_of(prompt: int) -> tuple[BlockKey, ...]:
    tokens = [prompt, *range(BLOCK_COUNT * BLOCK_TOKENS - 1)]
    return block_keys(NAMESPACE, tokens, BLOCK_TOKENS)


def gb_per_s(action: Callable[[], None], block_count: int) -> float:
    began_s = time.perf_counter()
    action()
    return block_count * BLOCK_BYTES / (time.perf_counter() - began_s) / 1e9


def measure(options: Options) -> Iterator[Row]:
    if options.arguments.gpu:
        yield from kvstore_gpu.measure(options)
        return
    yield from copies(options)
    yield from chain_rows(options)
    with running_node(slot_count=NODE_SLOTS) as address:
        yield from handoff_rows(options, address)


def copies(options: Options) -> Iterator[Row]:
    source = np.frombuffer(os.urandom(BLOCK_BYTES), np.uint8)
    buffer = memoryview(bytearray(BLOCK_BYTES))
    target = np.frombuffer(buffer, np.uint8)
    memory = np.ones((SLOT_COUNT, BLOCK_BYTES), np.uint8)
    rows = itertools.cycle(range(SLOT_COUNT))

    def copy_in() -> None:
        for _ in range(BLOCK_COUNT):
            np.copyto(memory[next(rows)], source)

    def copy_out() -> None:
        for _ in range(BLOCK_COUNT):
            np.copyto(target, memory[next(rows)])

    def fill(_: int, out: memoryview) -> None:
        np.copyto(np.frombuffer(out, np.uint8), source)

    with (
        running_node(slot_count=SLOT_COUNT) as address,
        bare_peer(_BARE_PEER, BLOCK_BYTES) as bare,
    ):
        local = StoreClient(address, host=local_host_id(), owner="local")
        remote = StoreClient(address, host=HostId("elsewhere"), owner="remote")
        prompts = iter(range(1_000_000))

        def put(client: StoreClient) -> Callable[[], float]:
            def action() -> float:
                keys = keys_of(next(prompts))
                return gb_per_s(lambda: _expect(client.put(keys, 0, fill)), BLOCK_COUNT)

            return action

        def read(client: StoreClient, claim: Claim) -> None:
            for index in range(claim.count):
                client.read(claim, index, buffer)

        def first_read() -> float:
            keys = keys_of(next(prompts))
            remote.put(keys, 0, fill)
            claim = local.claim(keys)
            try:
                return gb_per_s(lambda: read(local, claim), claim.count)
            finally:
                local.release(claim)

        def read_again(client: StoreClient, claim: Claim) -> Callable[[], float]:
            return lambda: gb_per_s(lambda: read(client, claim), claim.count)

        def over_bare_socket() -> None:
            for _ in range(BLOCK_COUNT):
                bare.sendall(b"?")
                rest = buffer
                while len(rest):
                    rest = rest[bare.recv_into(rest) :]

        for _ in range(SLOT_COUNT // BLOCK_COUNT + 1):  # every page touched by everybody
            put(local)()
        held_keys = keys_of(next(prompts))
        local.put(held_keys, 0, fill)
        held_local, held_remote = local.claim(held_keys), remote.claim(held_keys)
        samples = interleave(
            options.rounds(30),
            copy_in=lambda: gb_per_s(copy_in, BLOCK_COUNT),
            copy_out=lambda: gb_per_s(copy_out, BLOCK_COUNT),
            put=put(local),
            first_read=first_read,
            read_again=read_again(local, held_local),
            bare=lambda: gb_per_s(over_bare_socket, BLOCK_COUNT),
            remote_read=read_again(remote, held_remote),
            remote_put=put(remote),
            claim=lambda: _claim_us(local, held_keys),
        )
        local.close()
        remote.close()

    def compared(name: str, key: str, peer: str, peer_key: str, limit: float) -> Row:
        return row(
            name,
            samples[key],
            "GB/s",
            reference=peer,
            reference_samples=samples[peer_key],
            bar=at_least(limit, of="ratio"),
        )

    yield compared("put, shared memory", "put", "memcpy into 139 MB", "copy_in", 0.2)
    yield compared(
        "first read, shared memory, verified", "first_read", "memcpy out of 139 MB", "copy_out", 0.3
    )
    yield compared(
        "next reads, shared memory", "read_again", "memcpy out of 139 MB", "copy_out", 0.4
    )
    yield compared("read, TCP, verified", "remote_read", "bare TCP", "bare", 0.25)
    yield compared("put, TCP, verified", "remote_put", "bare TCP", "bare", 0.15)
    yield row(f"claim and release {BLOCK_COUNT} blocks", samples["claim"], "µs", bar=at_most(1000))
    yield from itertools.chain(
        measure_ssd(options),
        measure_local(options),
        kvstore_remote.measure(options),
        measure_tables(options),
        kvstore_master.measure(options),
    )


def _expect(stored_count: int) -> None:
    assert stored_count == BLOCK_COUNT


def _claim_us(client: StoreClient, keys: tuple[BlockKey, ...]) -> float:
    began_s = time.perf_counter()
    client.release(client.claim(keys))
    return (time.perf_counter() - began_s) * 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", action="store_true", help="the rows of a GPU, and no others")


if __name__ == "__main__":
    run("kvstore", measure, add_arguments=add_arguments)
