"""What must be true of a node when nobody holds anything, and what is left when it has ended."""

import os
import time
from pathlib import Path

from pdserve.errors import StoreError
from pdserve.kvstore.admin_client import StoreAdmin
from pdserve.kvstore.answers import StoreStat
from pdserve.kvstore.client import StoreClient
from tests.campaign.processes import NodeProcess
from tests.integration.store_nodes import ELSEWHERE

RELEASE_S_MAX = 10.0
"""For a node to notice the end of connections, when others want the cores."""

SETTLE_S_MAX = 1.0
"""From the end of the last connection to everything being free."""

DISK_S_MAX = 30.0
"""For what waits to go down to the disk, which holds a claim meanwhile."""

MASTERS = 2
"""Of the node with a disk: whoever leads is connected to it, and for a moment both do."""

DESCRIPTORS_SPARE = 1
"""The metadata's file, or a pipe to what warms the arena, may be open for a moment."""


def unbalanced(stat: StoreStat) -> str:
    """What is wrong with the sum of slots by state; "" when nothing is."""
    by_state = (
        stat.slots_free
        + stat.slots_reserved
        + stat.slots_committed
        + stat.slots_private
        + stat.slots_quarantined
        + stat.slots_draining
    )
    return "" if by_state == stat.slots_total else f"{by_state} slots by state: {stat}"


def held(stat: StoreStat, connections: int, masters: int = 0) -> str:
    """What is held though nobody is there; "" when nothing is. ``masters``: that may be connected
    beside the ``connections``."""
    names = (
        *("slots_reserved", "slots_private", "slots_quarantined", "slots_draining"),
        "slots_pinned",
        *("claims", "writes", "tickets", "tickets_queued"),
    )
    left = {name: getattr(stat, name) for name in names if getattr(stat, name)}
    if not connections <= stat.connections <= connections + masters:
        left["connections"] = stat.connections
    return "" if not left else ", ".join(f"{name} {count}" for name, count in left.items())


def audit(node: NodeProcess, *, is_damaged: bool) -> str:
    """What a node still holds after everybody has let go, or, unless its blocks are damaged on
    purpose, what its own audit finds; "" when nothing."""
    assert node.address is not None
    try:
        client = StoreClient(node.address, host=ELSEWHERE, owner="auditor", verify=False)
    except StoreError as error:
        return f"the auditor cannot connect: {error}"
    try:
        until_s = time.monotonic() + (DISK_S_MAX if node.plan.ssd else RELEASE_S_MAX)
        is_alone = False
        connections = 2 if node.plan.ssd else 1  # the disk is an owner like any other
        masters = MASTERS if node.plan.ssd else 0
        while True:
            stat = client.stat()
            problem = unbalanced(stat) or held(stat, connections, masters)
            if not problem:
                return _boards(node) or _descriptors(node) or ("" if is_damaged else _books(node))
            if not is_alone and stat.connections == connections and not node.plan.ssd:
                is_alone = True
                until_s = min(until_s, time.monotonic() + SETTLE_S_MAX)
            if time.monotonic() > until_s:
                return f"leaked: {problem}"
            time.sleep(0.02)
    except StoreError as error:
        return f"the auditor lost its connection: {error}"
    finally:
        client.close()


def _books(node: NodeProcess) -> str:
    """What the node finds when it compares its books, its headers and every byte."""
    assert node.address is not None
    asker = StoreAdmin(node.address, host=ELSEWHERE)
    try:
        return "; ".join(asker.audit().findings)
    finally:
        asker.close()


def _boards(node: NodeProcess) -> str:
    """The auditor is on another host, so nobody has one now."""
    count = node.boards()
    return f"leaked: {count} boards of readers" if count else ""


def _descriptors(node: NodeProcess) -> str:
    count = node.descriptors()
    if node.descriptors_at_rest is None:
        node.descriptors_at_rest = count
    masters = MASTERS if node.plan.ssd else 0
    if count > node.descriptors_at_rest + DESCRIPTORS_SPARE + masters:
        return f"leaked: {count} descriptors, {node.descriptors_at_rest} at the first audit"
    return ""


def left_behind(shared: Path, sockets: list[Path]) -> str:
    """Files that ended nodes have left; "" when none."""
    left = [str(path) for path in shared.rglob("*") if path.is_file()]
    left += [str(path) for folder in sockets for path in folder.glob("*")]
    return "" if not left else f"left behind: {', '.join(left[:10])}"


def own_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
