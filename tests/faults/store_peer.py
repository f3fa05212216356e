"""A process that holds something at a store node until it is killed.

    python -m tests.faults.store_peer ROLE ADDRESS(JSON) REMOTE(0|1)

prints ``held`` (and a ticket's id, where there is one) and never ends by itself.
"""

import json
import sys
import threading

from pdserve.ids import RequestId
from pdserve.kvstore.client import StoreClient
from pdserve.messages import Address
from pdserve.wire.hosts import local_host_id
from tests.integration.store_nodes import ELSEWHERE, filler, keys_of


def say_and_wait(*words: str) -> None:
    print("held", *words, flush=True)
    threading.Event().wait()


def main(role: str, address: str, remote: str) -> None:
    client = StoreClient(
        Address(**json.loads(address)),
        host=ELSEWHERE if remote == "1" else local_host_id(),
        owner="peer",
    )
    keys = keys_of("peer", 3)

    def wait_in_the_middle(index: int, out: memoryview) -> None:
        filler("peer")(index, out)
        if index == 1:
            say_and_wait()

    def ticket_with_blocks() -> str:
        ticket = client.open_ticket(RequestId("r"), 0, reader="reader", block_count=4, wait_ms=0)
        client.push(ticket, keys[:2], 0, filler("peer"))
        return ticket

    match role:
        case "claims":
            client.put(keys, 0, filler("peer"))
            client.claim(keys)
            say_and_wait()
        case "puts":
            client.put(keys, 0, wait_in_the_middle)
        case "pushes":
            ticket = client.open_ticket(
                RequestId("r"), 0, reader="reader", block_count=4, wait_ms=0
            )
            client.push(ticket, keys, 0, wait_in_the_middle)
        case "has a ticket":
            say_and_wait(ticket_with_blocks())
        case "has sealed":
            ticket_id = ticket_with_blocks()
            client.push_tail(ticket_id, lambda out: filler("peer")(2, out))  # type: ignore[arg-type]
            client.seal(ticket_id)  # type: ignore[arg-type]
            say_and_wait(ticket_id)
        case "reads tickets":
            say_and_wait()
        case "waits":
            print("held", flush=True)
            client.open_ticket(RequestId("r"), 0, reader="*", block_count=16, wait_ms=600_000)


if __name__ == "__main__":
    main(*sys.argv[1:])
