"""``pdserve kv replay TRACE`` as a user runs it: a process of its own, which starts a node of its
own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PATIENCE_S = 240.0


def replayed(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "pdserve.cluster.cli", "kv", "replay", *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_a_trace_is_played_with_real_bytes_and_the_hits_of_the_simulation(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    turns = [
        {
            "timestamp": 10 * index,
            "hash_ids": [*range(4), *range(100 * (index % 7), 100 * (index % 7) + 5)],
        }
        for index in range(60)
    ]
    trace.write_text("\n".join(map(json.dumps, turns)))
    ended = replayed(str(trace), "--slots", "24", "--block-bytes", "4096", "--speed", "0", "--json")
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    assert said["prompts"] == len(turns)
    assert said["hits"] == said["hits_simulated"] > 0
    assert said["bytes_read"] == 4096 * said["hits"]
    assert (said["wrong"], said["holds"]) == (0, True)


def test_a_line_that_is_none_is_named(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "hash_ids": [1]}\n{"timestamp": 1}\n')
    ended = replayed(str(trace))
    assert ended.returncode != 0
    assert "line 2" in ended.stderr + ended.stdout
    assert "Traceback" not in ended.stderr
