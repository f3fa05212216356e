"""How gRPC clients of tests connect, where how they do it matters."""

import json
from typing import Any

RETRIES = {
    "maxAttempts": 5,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
"""What a client may be told to send again, in gRPC's own words."""


def own_connection(*, retries: bool) -> list[tuple[str, Any]]:
    """Options of a channel that shares its connection with no other one of this process."""
    policy = {"methodConfig": [{"name": [{}], "retryPolicy": RETRIES}]} if retries else {}
    return [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.service_config", json.dumps(policy)),
    ]
