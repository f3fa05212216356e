"""A process that holds something at a store node until it is killed.

    python -m tests.faults.store_peer ROLE ADDRESS(JSON) REMOTE(0|1)

prints ``held`` (and a ticket's id, where there is one) and never ends by itself, but for those who
look at blocks: on a line of input they say whether what they saw was right, and end.
"""

import json
import random
import select
import sys
import threading

from pdserve.ids import RequestId
from pdserve.kvstore.client import StoreClient
from pdserve.messages import Address
from pdserve.wire.hosts import local_host_id
from tests.integration.store_nodes import ELSEWHERE, content, filler, keys_of


def say_and_wait(*words: str) -> None:
    print("held", *words, flush=True)
    threading.Event().wait()


def compare(client: StoreClient, chance: random.Random) -> None:
    """Claim chains and look at every block, until there is input; then say what was seen."""
    right_count = wrong_count = 0
    print("held", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        name = chance.choice("abcdefgh")
        claim = client.claim(keys_of(name, 4))
        for index in range(claim.count):
            is_right = client.view(claim, index) == content(name, index)
            right_count += is_right
            wrong_count += not is_right
        client.release(claim)
    print(right_count, wrong_count, client.counters["claims_local"], flush=True)


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
        case "views":
            client.put(keys, 0, filler("peer"))
            claim = client.claim(keys)
            views = [client.view(claim, index) for index in range(claim.count)]
            print("held", flush=True)
            sys.stdin.readline()
            print(*(view == content("peer", index) for index, view in enumerate(views)), flush=True)
        case "compares":
            compare(client, random.Random(1))
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
