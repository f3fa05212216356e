"""``pdserve status`` of one model and of several."""

from io import StringIO
from typing import Any

from rich.console import Console

from pdserve.cluster.commands.status import render
from pdserve.cluster.gateway.models import merged
from pdserve.cluster.http_client import of_model


def snapshot(worker: str, waiting: int) -> dict[str, Any]:
    return {
        "workers": [
            {
                "worker": worker,
                "role": "decode",
                "pid": 7,
                "running": 1,
                "waiting": 0,
                "free_blocks": 3,
                "block_count": 4,
                "draining": False,
                "duty": "decode",
                "counters": {"tasks": 3, "resident_bytes": 300 << 20, "open_fds": 9},
            }
        ],
        "queue_lengths": [waiting, 0],
        "queued_work_ms": 1,
        "oldest_wait_ms": 10 * waiting,
        "oldest_request": None,
        "parked": 0,
        "phases": {},
        "counters": {"dispatched": 5},
        "router": {"epoch": 1, "tasks": 3, "resident_bytes": 150 << 20, "open_fds": 9},
    }


def shown(tree: dict[str, Any]) -> list[str]:
    out = StringIO()
    Console(file=out, width=120).print(render(tree))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_one_model_is_shown_without_its_name() -> None:
    lines = shown(snapshot("d-1", 2))
    assert lines[0].startswith("worker")
    assert "queue by level  2 0   oldest 20 ms   parked 0" in lines
    assert lines[1].split()[-3:] == ["300", "MiB", "up"]
    assert "router           epoch 1   memory 150 MiB" in lines


def test_several_are_shown_with_theirs_and_one_that_does_not_answer_says_so() -> None:
    whole = merged({"a": snapshot("d-1", 2), "b": snapshot("d-2", 1)}, silent=["c"])
    lines = shown(whole)
    assert lines[0].startswith("model")
    assert [line.split()[:2] for line in lines[1:3]] == [["a", "d-1"], ["b", "d-2"]]
    assert "queue by level  3 0   oldest 20 ms   parked 0" in lines
    assert "  of b 1 0   oldest 10 ms   parked 0" in lines
    assert "  of c: no answer" in lines
    assert any(line.split() == ["dispatched", "10"] for line in lines)


def test_a_model_s_name_goes_into_a_query_as_it_must() -> None:
    assert of_model("/cluster/status", None) == "/cluster/status"
    assert of_model("/cluster/status", "org/a b&c") == "/cluster/status?model=org%2Fa%20b%26c"
