"""Which store nodes a command is about: those of a running cluster, or those it names.

The gateway's ``/cluster/status`` has the store of every worker, and with it how it is reached: its
Unix socket from its own host, TCP from another. A node that no worker uses is named by hand.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.cluster.http_client import get_json
from pdserve.errors import ConfigError
from pdserve.ids import HostId
from pdserve.kvstore.admin_client import StoreAdmin
from pdserve.kvstore.security import Credentials
from pdserve.messages import Address
from pdserve.wire.hosts import local_host_id


@dataclass(frozen=True, slots=True)
class Store:
    """One node with an open connection."""

    host: str
    admin: StoreAdmin

    @property
    def name(self) -> str:
        return self.admin.store_id


@contextlib.contextmanager
def stores_of(
    url: str, nodes: Sequence[str], credentials: Credentials | None = None
) -> Iterator[list[Store]]:
    """Connected to each; by name. ``credentials``: for those on other hosts.

    Raises:
        ConfigError: nothing answers at ``url``, or it knows of no store.
        StoreUnavailable: a store does not answer.
        AccessDenied: it wants a token.
    """
    addresses = [address_of(node) for node in nodes]
    if not addresses:
        addresses = list(addresses_in(get_json(url, "/cluster/status")))
    if not addresses:
        raise ConfigError(f"the cluster at {url} has no worker, and so no store yet; try again")
    here = local_host_id()
    with contextlib.ExitStack() as ending:
        stores = []
        for address in addresses:
            admin = StoreAdmin(address, host=here, credentials=credentials)
            ending.callback(admin.close)
            stores.append(Store(address.host, admin))
        yield sorted(stores, key=lambda store: (store.host, store.name))


def address_of(node: str) -> Address:
    """Of ``--node``: the path of a Unix socket on this host, or host:port."""
    if "/" in node:
        return Address(local_host_id(), node, "")
    name, _, port = node.rpartition(":")
    if not name or not port.isdecimal():
        raise ConfigError(f"--node is {node!r}; it must be a socket's path or host:port")
    return Address(HostId(name), "", node)


def addresses_in(snapshot: Mapping[str, Any]) -> Iterator[Address]:
    """Of the stores of a router's snapshot, each once."""
    seen = set()
    for worker in snapshot.get("workers", ()):
        if worker["store_id"] not in seen:
            seen.add(worker["store_id"])
            store = worker["store"]
            yield Address(HostId(store["host"]), store["unix_path"], store["tcp"])
