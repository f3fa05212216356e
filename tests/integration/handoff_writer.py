"""A prefill worker that stops in the middle of its third chunk, until it is killed.

    python -m tests.integration.handoff_writer ADDRESS(JSON)

has ``CHUNKS_DONE`` chunks of ``CHUNK_BLOCKS`` blocks committed under a ticket, half of the next
one's bytes in its slots, and its tail begun; then it prints ``held``.
"""

import json
import sys
import threading

from pdserve.ids import RequestId
from pdserve.kvstore.client import StoreClient
from pdserve.messages import Address
from pdserve.wire.hosts import local_host_id
from tests.integration.store_nodes import BLOCK_BYTES, content, filler, keys_of

NAME = "killed"
CHUNK_BLOCKS = 2
CHUNKS_DONE = 2
CHUNKS = CHUNKS_DONE + 1
BLOCKS = CHUNKS * CHUNK_BLOCKS


def main(address: str) -> None:
    client = StoreClient(Address(**json.loads(address)), host=local_host_id(), owner="p")
    ticket = client.open_ticket(
        RequestId("r"), 0, reader="d", block_count=BLOCKS + 1, wait_ms=10_000
    )
    keys = keys_of(NAME, BLOCKS)
    for end in range(CHUNK_BLOCKS, CHUNKS_DONE * CHUNK_BLOCKS + 1, CHUNK_BLOCKS):
        client.push(ticket, keys[:end], end - CHUNK_BLOCKS, filler(NAME))
    write = client.begin_push(ticket, keys, CHUNKS_DONE * CHUNK_BLOCKS)
    tail = client.begin_tail(ticket)
    assert write is not None
    assert tail is not None
    half = BLOCK_BYTES // 2
    for index in write.indices:

        def fill(out: memoryview, index: int = index) -> None:
            out[:] = content(NAME, index)[:half]

        write.add(index, half, fill)
    print("held", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1])
