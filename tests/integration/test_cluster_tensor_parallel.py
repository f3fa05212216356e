"""Workers of two processes behind the whole cluster, and one that loses a process."""

import os
import signal
from pathlib import Path

import pytest

from tests.integration.harness import random_prompts, running, settings, wait_for
from tests.models.reference import reference_tokens

OUTPUT_TOKENS = 24


@pytest.mark.slow
def test_workers_of_two_processes_serve_and_one_that_loses_a_process_is_replaced(
    small_model: Path, tmp_path: Path
) -> None:
    """Prefill has two processes, decode one, with both parts each."""
    config = settings(
        small_model,
        model={"dtype": "float32"},
        prefill={"tensor_parallel": 2},
    )
    prompts = random_prompts(3, seed=5, length=200)
    expected = reference_tokens(small_model, prompts, OUTPUT_TOKENS, scratch=tmp_path)
    with running(config) as cluster:
        assert [cluster.tokens(prompt, OUTPUT_TOKENS) for prompt in prompts] == expected
        (pid,) = cluster.pids("prefill")
        (follower,) = children_of(pid)
        os.kill(follower, signal.SIGKILL)
        wait_for("another worker", lambda: cluster.pids("prefill") not in ([], [pid]))
        assert [cluster.tokens(prompt, OUTPUT_TOKENS) for prompt in prompts] == expected
        (follower,) = children_of(*cluster.pids("prefill"))
    wait_for("its processes to end", lambda: not Path(f"/proc/{follower}").exists())


def children_of(pid: int) -> list[int]:
    """Those that follow."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            if b"pdserve.engine.follower" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found
