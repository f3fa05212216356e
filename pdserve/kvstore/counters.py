"""What a client counts, from when it was made."""

from collections import Counter

COUNTERS = (
    "claims_local",  # answered without asking the node
    "blocks_put",  # written by ``put``
    "blocks_pushed",  # written by ``push`` and ``push_tail``
    "bytes_pushed",
    "blocks_present",  # asked to be written, but stored already
    "blocks_restored",  # read
    "bytes_restored",
    "blocks_verified",  # read with their checksum computed
    "checksum_failures",
    "remote_bytes",  # block bytes that went over a socket, either way
)


def new_counters() -> Counter[str]:
    return Counter(dict.fromkeys(COUNTERS, 0))
