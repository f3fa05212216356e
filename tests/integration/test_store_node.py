"""The node process: how it starts, how it ends, and what it leaves behind."""

import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from pdserve.errors import StoreUnavailable
from pdserve.kvstore.directory import root_of
from pdserve.kvstore.masters.metadata import EmbeddedMetadata
from pdserve.kvstore.node import main
from tests.integration.store_nodes import PATIENCE_S, filler, keys_of, read, running_node


def leftovers(directory: Path) -> list[Path]:
    """Files and folders, without the two folders that the test itself has made room for."""
    return [path for name in ("sockets", "shared") for path in (directory / name).iterdir()]


@pytest.mark.parametrize("how", ["end of input", "SIGTERM", "SIGINT"])
def test_an_orderly_end_leaves_nothing(tmp_path: Path, how: str) -> None:
    metadata = tmp_path / "metadata.sqlite"
    with running_node(tmp_path, "--metadata", str(metadata)) as node:
        (member,) = EmbeddedMetadata(metadata).members()
        assert member.address == node.address
        assert member.epoch == 1
        client = node.client("w")
        client.put(keys_of("a", 1), 0, filler("a"))
        if how == "end of input":
            assert node.stop() == 0
        else:
            node.process.send_signal(signal.Signals[how])
            assert node.process.wait(PATIENCE_S) == 0
        with pytest.raises(StoreUnavailable):
            client.stat()
        client.close()
    assert leftovers(tmp_path) == []
    assert EmbeddedMetadata(metadata).members() == ()


def test_an_arena_is_warmed_while_nobody_else_wants_the_core(tmp_path: Path) -> None:
    arena = tmp_path / "arena"
    arena.write_bytes(bytes(20 << 20))
    code = "import os, sys; from pdserve.kvstore import warming; warming.main(sys.argv[1]); "
    code += "print(os.sched_getscheduler(0) == os.SCHED_IDLE)"
    command = [sys.executable, "-c", code, str(arena)]
    assert subprocess.check_output(command, text=True, timeout=PATIENCE_S) == "True\n"


def test_warming_ends_with_its_node(tmp_path: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="pdserve-test-", dir="/dev/shm") as shared,
        running_node(tmp_path, "--arena-bytes", str(1 << 30), shared=Path(shared)) as node,
    ):
        children = Path(f"/proc/{node.pid}/task/{node.pid}/children")
        deadline_s = time.monotonic() + PATIENCE_S
        while not children.read_text().split():
            assert time.monotonic() < deadline_s, "nobody warms the arena"
        (child,) = children.read_text().split()
        ended = os.pidfd_open(int(child))
        os.kill(node.pid, signal.SIGKILL)
        node.process.wait(PATIENCE_S)
        # Not by looking again and again: that would take the processor of who runs when it is idle.
        assert select.select([ended], [], [], PATIENCE_S)[0], "it goes on for nobody"
        os.close(ended)


def test_a_killed_node_is_noticed_at_once_and_cleaned_up_by_the_next(tmp_path: Path) -> None:
    table = tmp_path / "metadata.sqlite"
    metadata = ("--metadata", str(table))
    with running_node(tmp_path, "--store-id", "first", *metadata) as node:
        client, remote = node.client("w"), node.client("x", remote=True)
        client.put(keys_of("a", 2), 0, filler("a"))
        claim = client.claim(keys_of("a", 2))
        os.kill(node.pid, signal.SIGKILL)
        node.process.wait(PATIENCE_S)
        for each in (client, remote):
            with pytest.raises(StoreUnavailable):
                each.claim(keys_of("a", 2))
        client.release(claim)
    assert len(leftovers(tmp_path)) == 2
    assert [member.store_id for member in EmbeddedMetadata(table).members()] == ["first"]
    with running_node(tmp_path, "--store-id", "second", *metadata) as successor:
        assert [member.store_id for member in EmbeddedMetadata(table).members()] == ["second"]
        assert [path.name for path in root_of(tmp_path / "shared").iterdir()] == ["second"]
        assert [path.name for path in (tmp_path / "sockets").iterdir()] == ["second.sock"]
        fresh = successor.client("w")
        assert read(fresh, keys_of("a", 2)) == []
        fresh.close()
    client.close()
    remote.close()


def test_a_call_that_waits_when_the_node_is_killed_ends_at_once(tmp_path: Path) -> None:
    with running_node(tmp_path) as node:
        holder, waiter = node.client("p1"), node.client("p2")
        holder.open_ticket("r", 0, reader="*", block_count=16, wait_ms=0)  # type: ignore[arg-type]
        caught: list[Exception] = []

        def wait() -> None:
            try:
                waiter.open_ticket("s", 0, reader="*", block_count=1, wait_ms=60_000)  # type: ignore[arg-type]
            except StoreUnavailable as error:
                caught.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        while holder.stat().tickets_queued == 0:
            pass
        os.kill(node.pid, signal.SIGKILL)
        waiting.join(PATIENCE_S)
        assert len(caught) == 1
        holder.close()
        waiter.close()


def test_what_a_reader_has_mapped_outlives_the_node(tmp_path: Path) -> None:
    with running_node(tmp_path) as node:
        client = node.client("w")
        client.put(keys_of("a", 1), 0, filler("a"))
        claim = client.claim(keys_of("a", 1))
        node.stop()
        out = memoryview(bytearray(client.block_bytes))
        client.read(claim, 0, out)
        assert bytes(out[:4]) == b"a/0/"
        client.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arena-bytes", "10", "--block-bytes", "4096"], "holds 0 blocks"),
        (["--arena-bytes", str(1 << 50), "--block-bytes", str(1 << 40)], "lower store.arena_bytes"),
        (
            ["--arena-bytes", "8192", "--block-bytes", "4096", "--tcp-host", "192.0.2.1"],
            "cannot listen at 192.0.2.1",
        ),
        (
            [
                *("--arena-bytes", "8192", "--block-bytes", "4096"),
                *("--redis-url", "redis://user:secret@127.0.0.1:1"),
            ],
            "cannot use Redis at 127.0.0.1:1",
        ),
        (
            ["--arena-bytes", "8192", "--block-bytes", "4096", "--key-file", "/nowhere"],
            "store.key_file is /nowhere: No such file",
        ),
        (
            ["--arena-bytes", "8192", "--block-bytes", "4096", "--mooncake"],
            "give --tcp-host as well",
        ),
    ],
)
def test_a_node_that_cannot_start_says_why_and_leaves_nothing(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    for name in ("sockets", "shared"):
        (tmp_path / name).mkdir(mode=0o700)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pdserve.kvstore.node"),
            *("--directory", str(tmp_path / "sockets"), "--shared", str(tmp_path / "shared")),
            *arguments,
        ],
        input="",
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "secret" not in result.stderr
    assert leftovers(tmp_path) == []


def test_help_needs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "--arena-bytes" in capsys.readouterr().out
