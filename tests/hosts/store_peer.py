"""A client of a store node, on whatever host this runs.

    python -m tests.hosts.store_peer ADDRESS(JSON) [SECRETS_DIRECTORY]

Each line of input is a command, each line of output its answer, in JSON:

    put NAME COUNT      → how many blocks were stored
    hold NAME COUNT     → 0, with the slots reserved; the next line, whatever it is, ends that put
    read NAME COUNT     → how many blocks came, each of them as it must be
    host                → this process's host id

and {"error": class, "said": message} when a command or the connection fails.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from pdserve.errors import PdserveError
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.security import Credentials
from pdserve.messages import Address
from pdserve.wire.hosts import local_host_id
from tests.integration.store_nodes import content, filler, keys_of, read


def credentials_in(directory: str) -> Credentials:
    """Of files as ``make_certificates`` names them, with a key file beside them."""
    where = Path(directory)
    return Credentials(
        tls_authority=where / "authority.pem",
        tls_certificate=where / "member.pem",
        tls_key=where / "member.key",
        key_file=where / "cluster.key",
    )


def main(address: str, *secrets: str) -> None:
    client: StoreClient | None = None
    own = credentials_in(secrets[0]) if secrets else Credentials()
    for line in sys.stdin:
        verb, *rest = line.split()
        answer: object
        try:
            if client is None:
                client = StoreClient(
                    Address(**json.loads(address)),
                    host=local_host_id(),
                    owner="peer",
                    ssl_context=own.ssl_context(server_side=False),
                    token=own.worker_token(),
                )
            answer = _do(client, verb, rest)
        except PdserveError as error:
            client = None  # the next command connects again
            answer = {"error": type(error).__name__, "said": str(error)}
        print(json.dumps(answer), flush=True)


def _do(client: StoreClient, verb: str, rest: list[str]) -> object:
    if verb == "host":
        return local_host_id()
    name, count = rest[0], int(rest[1])
    if verb == "put":
        return client.put(keys_of(name, count), 0, filler(name))
    if verb == "hold":
        return client.put(keys_of(name, count), 0, _held(name))
    blocks = read(client, keys_of(name, count))
    assert blocks == [content(name, index) for index in range(len(blocks))], "another's bytes"
    return len(blocks)


def _held(name: str) -> Callable[[int, memoryview], None]:
    def fill(index: int, out: memoryview) -> None:
        if index == 0:
            print(0, flush=True)
            sys.stdin.readline()
        filler(name)(index, out)

    return fill


if __name__ == "__main__":
    main(*sys.argv[1:])
