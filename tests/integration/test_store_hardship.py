"""A node that lacks what it needs, and peers that ask for what is not theirs.

What is documented for such a time holds: who is connected goes on, who is not gets an error that
says so, and when it is over everything is as before.
"""

import contextlib
import dataclasses
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pdserve.errors import StoreUnavailable
from pdserve.ids import BLOCK_KEY_BYTES, BlockKey
from pdserve.kvstore.admin_client import StoreAdmin
from pdserve.kvstore.capability import Operation, mint, own_keys
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.core import StoreCore
from tests.integration.store_nodes import (
    ELSEWHERE,
    PATIENCE_S,
    Node,
    content,
    filler,
    keys_of,
    read,
    running_node,
)

pytestmark = pytest.mark.slow

DESCRIPTORS_MAX = 40
LIMITED = (
    "import os, resource, sys; "
    f"resource.setrlimit(resource.RLIMIT_NOFILE, ({DESCRIPTORS_MAX}, {DESCRIPTORS_MAX})); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)

LATE = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from pdserve.kvstore import arena_memory, node\n"
    "take = arena_memory.ArenaMemory.take_piece\n"
    "def take_late(memory):\n"
    "    while not Path(sys.argv[1]).exists(): time.sleep(0.005)\n"
    "    take(memory)\n"
    "arena_memory.ArenaMemory.take_piece = take_late\n"
    "sys.exit(node.main(sys.argv[5:]))\n"
)
"""A node that takes the memory of its arena once a file is there."""

SHARED_BYTES = 4 << 20
SLOTS = 600  # 2.4 MiB of it
WRITER = (
    "import json, sys\n"
    "from pathlib import Path\n"
    "from pdserve.errors import PdserveError\n"
    "from pdserve.kvstore.client import StoreClient\n"
    "from pdserve.messages import Address\n"
    "from pdserve.wire.hosts import local_host_id\n"
    "from tests.integration.store_nodes import ELSEWHERE, filler, keys_of\n"
    "address = Address(**json.loads(sys.argv[1]))\n"
    "host = local_host_id() if sys.argv[2] == 'local' else ELSEWHERE\n"
    "client = StoreClient(address, host=host, owner='writer', warm=True)\n"
    "try:\n"
    "    print(client.put(keys_of('much', 500), 0, filler('much')))\n"
    "except PdserveError as error:\n"
    "    print(type(error).__name__, error)\n"
)
"""A process, since a write without memory behind it would end the one that writes."""

SECRET = b"the cluster's own secret"
PROBES = 1_000_000
PROBES_ASKED = 10_000
TIMED = 3_000
TRIMMED = 0.05
WELCH_MAX = 5.0


def test_without_descriptors_who_is_connected_goes_on(tmp_path: Path) -> None:
    with running_node(tmp_path, by=(sys.executable, "-c", LIMITED)) as node:
        first = node.client("first")
        assert first.put(keys_of("a", 3), 0, filler("a")) == 3
        others = _as_many_as_can(node)
        for round_ in range(20):
            assert read(first, keys_of("a", 3)) == [content("a", index) for index in range(3)]
            assert first.put(keys_of(f"b{round_}", 2), 0, filler("b")) == 2
        for client in others:
            client.close()
        late = _connected(node)
        assert read(late, keys_of("b19", 2)) == [content("b", index) for index in range(2)]
        assert late.stat().claims == 0
        late.close()
        first.close()


def _as_many_as_can(node: Node) -> list[StoreClient]:
    clients: list[StoreClient] = []
    while len(clients) <= DESCRIPTORS_MAX:
        try:
            clients.append(node.client(f"{len(clients)}", remote=len(clients) % 2 == 0))
        except StoreUnavailable:
            return clients
    raise AssertionError("it has descriptors enough")


def _connected(node: Node) -> StoreClient:
    """It takes a second until a node that had no descriptors accepts again."""
    until_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return node.client("late", remote=True)
        except StoreUnavailable:
            assert time.monotonic() < until_s, "it accepts nobody any more"


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs a mount of its own")
def test_too_little_shared_memory_is_said_before_anything_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    mount = f'mount -t tmpfs -o size=512k tmpfs "{shared}" || exit 77; exec "$@"'
    by = ("unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh")
    with (
        pytest.raises(AssertionError, match="ended with") as ended,
        running_node(tmp_path, slot_count=1000, shared=shared, by=by),
    ):
        pass
    said = capfd.readouterr().err
    if "ended with 2" not in str(ended.value):
        pytest.skip(f"nobody may mount here: {said}")
    assert "lower store.arena_bytes" in said
    assert "left" in said


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """Shared memory of its own, that a test may fill."""
    place = tmp_path / "small"
    place.mkdir()
    size = f"size={SHARED_BYTES},mode=700"
    mounted = subprocess.run(
        ("mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)), capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"nobody may mount here: {mounted.stderr.decode(errors='replace')}")
    try:
        yield place
    finally:
        subprocess.run(("umount", "--lazy", str(place)), check=True)


def _fill(place: Path) -> Path:
    """Take all that is left there."""
    hog = place / "hog"
    with hog.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return hog


@pytest.mark.parametrize("way", ["local", "remote"])
def test_a_node_whose_memory_others_took_ends_alone_and_says_so(
    tmp_path: Path, shared: Path, way: str, capfd: pytest.CaptureFixture[str]
) -> None:
    go = tmp_path / "go"
    by = (sys.executable, "-c", LATE, str(go))
    with running_node(tmp_path, slot_count=SLOTS, shared=shared, by=by) as node:
        client = node.client("reader")
        assert client.put(keys_of("a", 3), 0, filler("a")) == 3
        hog = _fill(shared)
        said = _written_by_another(node, way)
        assert said.startswith("StoreUnavailable"), said
        assert "shared memory" in said
        assert read(client, keys_of("a", 3)) == [content("a", index) for index in range(3)]
        assert client.stat().writes == 0
        go.touch()
        assert node.process.wait(PATIENCE_S) == 2
        assert "lower store.arena_bytes" in capfd.readouterr().err
        with pytest.raises(StoreUnavailable):
            client.stat()
        client.close()
    assert [each.name for each in shared.rglob("*") if each.is_file()] == ["hog"], "nothing is left"
    hog.unlink()
    with running_node(tmp_path, slot_count=SLOTS, shared=shared) as successor:
        client = successor.client("reader")
        assert client.put(keys_of("a", 3), 0, filler("a")) == 3
        client.close()


def _written_by_another(node: Node, way: str) -> str:
    command = (sys.executable, "-c", WRITER, json.dumps(dataclasses.asdict(node.address)), way)
    writer = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert writer.returncode == 0, f"it ended with {writer.returncode}: {writer.stderr}"
    return writer.stdout


def test_who_has_its_memory_is_not_concerned_when_there_is_no_more(
    tmp_path: Path, shared: Path
) -> None:
    with running_node(tmp_path, slot_count=SLOTS, shared=shared) as node:
        _wait_until_whole(shared)
        hog = _fill(shared)
        for way in ("local", "remote"):
            client = node.client(way, remote=way == "remote")
            for round_ in range(3):  # more than there are slots, so that blocks give way
                name = f"{way} {round_}"
                assert client.put(keys_of(name, 500), 0, filler(name)) == 500
                blocks = read(client, keys_of(name, 500))
                assert blocks == [content(name, index) for index in range(500)]
            client.close()
        keeper = StoreAdmin(node.address, host=ELSEWHERE)
        assert keeper.audit().findings == ()
        keeper.close()
        hog.unlink()


def _wait_until_whole(shared: Path) -> None:
    (arena,) = shared.rglob("arena")
    until_s = time.monotonic() + PATIENCE_S
    while arena.stat().st_blocks * 512 < arena.stat().st_size:
        assert time.monotonic() < until_s, "the arena never got its memory"
        time.sleep(0.01)


# ── tenants ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Peers over TCP need a token."""
    directory = tmp_path_factory.mktemp("tenants")
    key_file = directory / "cluster.key"
    key_file.touch(0o600)
    key_file.write_bytes(SECRET)
    with running_node(directory, "--key-file", str(key_file), slot_count=64) as node:
        yield node


def _client(node: Node, tenant: str) -> StoreClient:
    operations = (Operation.READ, Operation.WRITE)
    token = mint(SECRET, operations=operations, tenant=tenant, valid_s=600, now_s=time.time())
    return node.client(tenant, remote=True, token=token)


def test_no_probe_finds_a_foreign_tenants_block(node: Node) -> None:
    chance = random.Random(17)
    owner, thief = _client(node, "owner"), _client(node, "thief")
    keys = [keys_of(f"private {number}", 1)[0] for number in range(32)]  # each can be claimed
    assert sum(owner.put([key], 0, filler("private")) for key in keys) == 32
    local = node.client("local")
    stored = list(local.changes(-1).added)
    assert len(stored) >= 32
    assert all(owner.claim([key]).count == 1 for key in keys)
    honest = thief._key_prefix
    for number in range(PROBES_ASKED):
        thief._key_prefix = b"" if number % 2 else honest  # which a client may leave away
        key = chance.choice(stored if number % 4 < 2 else keys)
        assert thief.claim([key]).count == 0, key.hex()
    for client in (owner, thief, local):
        client.close()
    _probe_a_core(stored, chance)


def _probe_a_core(stored: Sequence[BlockKey], chance: random.Random) -> None:
    """As a node does for a connection of one tenant, without the way there."""
    core = StoreCore(len(stored))
    owner = core.connect("owner")
    for key in stored:
        write = core.reserve(owner, [key], 0)
        core.filled(owner, write.write, 0, 1)
        core.commit(owner, write.write)
    assert all(core.slots.find(key) is not None for key in stored)
    probes = 0
    while probes < PROBES:
        prefix = chance.randbytes(8)
        taken = own_keys(prefix, stored)
        assert [key for key in taken if core.slots.find(key) is not None] == []
        probes += len(taken)


def test_how_long_a_miss_takes_does_not_tell_whether_others_have_the_block(node: Node) -> None:
    chance = random.Random(23)
    owner, thief = _client(node, "owner2"), _client(node, "thief2")
    for number in range(16):
        assert owner.put(keys_of(f"timed {number}", 1), 0, filler("timed")) == 1
    local = node.client("local")
    theirs = local.changes(-1).added[-16:]
    taken: dict[bool, list[float]] = {True: [], False: []}
    order = [True, False] * TIMED
    chance.shuffle(order)
    thief._key_prefix = b""
    for is_stored in order:
        key = chance.choice(theirs) if is_stored else BlockKey(chance.randbytes(BLOCK_KEY_BYTES))
        began_s = time.perf_counter()
        count = thief.claim([key]).count
        taken[is_stored].append(time.perf_counter() - began_s)
        assert count == 0
    for client in (owner, thief, local):
        client.close()
    t = _welch(_trimmed(taken[True]), _trimmed(taken[False]))
    print(f"Welch's t of {TIMED} misses of each kind: {t:.2f}")
    assert abs(t) < WELCH_MAX


def _trimmed(samples: list[float]) -> list[float]:
    """Without the slowest, which say what else the machine did."""
    return sorted(samples)[: int(len(samples) * (1 - TRIMMED))]


def _welch(one: Sequence[float], other: Sequence[float]) -> float:
    spread = statistics.variance(one) / len(one) + statistics.variance(other) / len(other)
    return float((statistics.fmean(one) - statistics.fmean(other)) / spread**0.5)
