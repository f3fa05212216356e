"""One store under two secrets, and under two cuts of a model: nobody finds what is not his own.

What workers make of a prompt is a namespace and its keys; here they go to one real node with a
disk, which is then restarted.
"""

from pathlib import Path

import pytest

from pdserve.ids import BlockKey
from pdserve.kvstore.keys import MUST_MATCH, block_keys, namespace_of
from tests.integration.store_nodes import content, filler, read, running_node, wait_for

BLOCKS = 6
TOKENS = range(100, 100 + 4 * BLOCKS)


def keys_with(*, salt: str = "", parts: int = 1) -> list[BlockKey]:
    """Of the same prompt and the same model otherwise."""
    identity: dict[str, str | int] = {**dict.fromkeys(MUST_MATCH, "same"), "parts": parts}
    return list(block_keys(namespace_of(identity, salt=salt), TOKENS, 4))


@pytest.mark.slow
def test_the_same_salt_and_cut_share_over_a_restart_and_others_find_nothing(tmp_path: Path) -> None:
    disk = (
        *("--ssd-directory", str(tmp_path / "ssd"), "--ssd-bytes", str(1 << 30)),
        *("--ssd-write", "write_through"),
    )
    mine = keys_with(salt="mine", parts=2)
    strangers = [
        keys_with(salt="other", parts=2),
        keys_with(parts=2),
        keys_with(salt="mine", parts=1),
    ]
    whole = [content("mine", index) for index in range(BLOCKS)]
    with running_node(tmp_path, *disk) as node:
        client = node.client("first")
        assert client.put(mine, 0, filler("mine")) == BLOCKS
        for keys in strangers:
            assert read(client, keys) == []
        wait_for(client, lambda stat: stat.ssd["blocks"] == BLOCKS)
        client.close()
        node.stop()
    with running_node(tmp_path, *disk) as node:
        client = node.client("second")
        for keys in strangers:
            assert read(client, keys) == []
        assert read(client, keys_with(salt="mine", parts=2)) == whole
        client.close()
