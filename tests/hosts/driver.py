"""On the head: serves a configuration on the hosts' Ray cluster until its input ends.

    python -m tests.hosts.driver RAY_ADDRESS < CONFIGURATION(JSON, one line)

prints a line of JSON when it serves: {"http": base URL}; or {"error": …} when it does not start.
"""

import json
import sys

from pdserve.cluster.local import local_cluster
from pdserve.errors import PdserveError
from pdserve.settings import from_tree


def main(address: str) -> None:
    config = from_tree(json.loads(sys.stdin.readline()))
    try:
        with local_cluster(config, ray_address=address) as cluster:
            print(json.dumps({"http": cluster.http}), flush=True)
            sys.stdin.read()
    except PdserveError as error:
        print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
