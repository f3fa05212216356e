"""Names for things that cross process borders. Plain values; equality is identity.

A *request* here is one unit of scheduling: one choice of one client call. A call with ``n = 3``
becomes three requests that share their prompt's blocks by key.

Sources of uniqueness: random 64 bits for requests, the cluster's own naming for workers and hosts.
"""

import secrets
from typing import NewType

RequestId = NewType("RequestId", str)
"""One unit of scheduling; unique for ever. Attempts are counted beside it, not inside it."""

WorkerId = NewType("WorkerId", str)
"""One incarnation of one prefill or decode worker. A restarted worker has another id."""

StoreId = NewType("StoreId", str)
"""One incarnation of the store node of one host."""

HostId = NewType("HostId", str)
"""A machine, or what acts as one: processes with equal ids share ``/dev/shm`` and Unix sockets."""

BlockKey = NewType("BlockKey", bytes)
"""16 bytes: the chained hash of a block's tokens and of all tokens before it, in one namespace."""

BlockId = NewType("BlockId", int)
"""A block's place in one worker's device pool, from 0."""

SlotId = NewType("SlotId", int)
"""A block's place in one store node's arena, from 0."""

TicketId = NewType("TicketId", str)
"""One hand-off from a prefill worker to a decode worker."""

BLOCK_KEY_BYTES = 16


def new_request_id() -> RequestId:
    return RequestId(f"r-{secrets.token_hex(8)}")


def new_worker_id(role: str) -> WorkerId:
    return WorkerId(f"{role}-{secrets.token_hex(4)}")


def new_store_id() -> StoreId:
    return StoreId(f"store-{secrets.token_hex(4)}")


def new_ticket_id() -> TicketId:
    return TicketId(f"t-{secrets.token_hex(8)}")
