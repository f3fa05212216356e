"""The quick start does what it says: typed as it stands, on the shared cluster in every run, and in
a clone with an environment of its own in the long ones."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Empty, Queue

import pytest

from tests.integration.harness import TestCluster
from tests.integration.quickstart import PAGE, Block, blocks

ROOT = Path(__file__).parents[2]
READY = "Ctrl-C stops everything."
SETUP_S_MAX = 1500
TYPED_S_MAX = 600
END_S_MAX = 120


def typed(terminal: int) -> list[Block]:
    return [block for block in blocks() if block.terminal == terminal]


def test_the_second_terminal_answers(cluster: TestCluster) -> None:
    """All of it in one shell, as it is typed, on a cluster that runs already."""
    script = "".join(block.script for block in typed(2))
    for default, own in {
        "http://127.0.0.1:8000": cluster.url,
        "127.0.0.1:50051": cluster.cluster.grpc,
        ". .venv/bin/activate\n": f"PATH={Path(sys.executable).parent}:$PATH\n",
    }.items():
        assert default in script
        script = script.replace(default, own)
    ran = subprocess.run(
        ["bash", "-euo", "pipefail"],
        input=script,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TYPED_S_MAX,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert '"error"' not in ran.stdout
    assert '"why"' in ran.stdout or "decisions" in ran.stdout
    assert "queue by level" in ran.stdout


def test_the_first_terminal_sets_up_looks_and_serves() -> None:
    first = typed(1)
    assert [block.stays_open for block in first] == [False, False, True]
    assert [block.code for block in first][::2] == ["make setup\n", "pdserve serve\n"]
    planned = subprocess.run(
        ["make", "-n", "setup"], cwd=ROOT, capture_output=True, check=False, timeout=60
    )
    assert planned.returncode == 0
    assert READY in PAGE.read_text()


def test_a_block_without_a_terminal_is_found() -> None:
    with pytest.raises(AssertionError, match="says no terminal"):
        blocks("```sh\nmake setup\n```\n")


@pytest.mark.slow
@pytest.mark.timeout(SETUP_S_MAX + TYPED_S_MAX + 2 * END_S_MAX)
def test_on_a_clean_machine_every_block_runs_as_it_stands(tmp_path: Path) -> None:
    """A copy of what git knows or would take, an environment of its own, ports 8000 and 50051."""
    for port in (8000, 50051):  # the page's own
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"something else listens on port {port}")
    clone = tmp_path / "pdserve"
    copy_tree(clone)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV") and not name.startswith("PDSERVE_")
    }
    first = subprocess.Popen(
        ["bash", "-eu"],
        cwd=clone,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert first.stdin is not None
    said: Queue[str | None] = Queue()
    threading.Thread(target=read_all, args=(first, said), daemon=True).start()
    try:
        for block in typed(1):
            first.stdin.write(block.script)
        first.stdin.close()
        wait_for_line(said, READY, SETUP_S_MAX)
        second = subprocess.run(
            ["bash", "-euo", "pipefail"],
            input="".join(block.script for block in typed(2)),
            cwd=clone,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TYPED_S_MAX,
            check=False,
        )
        assert second.returncode == 0, second.stdout + second.stderr
        assert '"error"' not in second.stdout
        os.killpg(first.pid, signal.SIGINT)
        wait_for_line(said, "nothing is left behind", END_S_MAX)
        first.wait(END_S_MAX)
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGTERM)
            try:
                first.wait(END_S_MAX)
            except subprocess.TimeoutExpired:
                os.killpg(first.pid, signal.SIGKILL)
                first.wait(END_S_MAX)


def copy_tree(target: Path) -> None:
    """What git knows or would take, as a fresh checkout has it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, copy = ROOT / name, target / name
        if name in (".venv", ".models") or not (source.exists() or source.is_symlink()):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy, follow_symlinks=False)


def read_all(process: subprocess.Popen[str], lines: Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def wait_for_line(lines: Queue[str | None], wanted: str, seconds: float) -> None:
    """Reads until a line has ``wanted``; fails with all that was read instead."""
    until_s = time.monotonic() + seconds
    read: list[str] = []
    while time.monotonic() < until_s:
        try:
            line = lines.get(timeout=max(0.0, until_s - time.monotonic()))
        except Empty:
            break
        if line is None:
            break
        read.append(re.sub(r"\x1b\[[0-9;]*m", "", line))
        if wanted in read[-1]:
            return
    raise AssertionError(f"waited for {wanted!r}; what came was:\n" + "".join(read))
