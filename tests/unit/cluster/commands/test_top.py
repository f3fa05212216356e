"""``pdserve top``: rates from two looks, stores from the metrics, and what it shows of both."""

from typing import Any

import pytest
from rich.console import Console

from pdserve.cluster.commands import top as top_command
from pdserve.cluster.commands.top import look_of, rates, render_look, watch
from pdserve.cluster.http.metrics import FrontMetrics
from pdserve.errors import ConfigError

METRICS = """# HELP pdserve_kv_slots Slots of the arena
# TYPE pdserve_kv_slots gauge
pdserve_kv_slots{state="free",store="s-1"} 60.0
pdserve_kv_slots{state="reserved",store="s-1"} 3.0
pdserve_kv_slots{state="committed",store="s-1"} 36.0
pdserve_kv_slots{state="private",store="s-1"} 1.0
# TYPE pdserve_kv_held gauge
pdserve_kv_held{kind="tickets_queued",store="s-1"} 2.0
# TYPE pdserve_kv_blocks_total counter
pdserve_kv_blocks_total{outcome="asked",store="s-1"} 40.0
pdserve_kv_blocks_total{outcome="found_memory",store="s-1"} 30.0
pdserve_kv_blocks_total{outcome="found_disk",store="s-1"} 4.0
"""


def worker(name: str, generated: int, **fields: Any) -> dict[str, Any]:
    counters = {"tokens_generated": generated, "other": 9}
    what = {"worker": name, "role": "decode", "duty": "decode", "pid": 1, "draining": False}
    counts = {"running": 1, "waiting": 0, "free_blocks": 3, "block_count": 4, "counters": counters}
    return what | counts | fields


def snapshot(*workers: dict[str, Any]) -> dict[str, Any]:
    queue = {"queue_lengths": [2, 0], "oldest_wait_ms": 5, "parked": 0, "counters": {"lost": 1}}
    return {"workers": workers, **queue}


def shown(*looks: Any) -> str:
    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_look(*looks))
    return console.export_text()


def test_rates_are_of_workers_that_were_there_both_times() -> None:
    before = look_of(snapshot(worker("d-1", 100), worker("d-2", 900)), "", 10.0)
    now = look_of(snapshot(worker("d-1", 150), worker("d-3", 7000)), "", 12.0)
    assert rates(before, now)["tokens generated"] == 25.0
    assert rates(None, now)["tokens generated"] is None
    assert rates(now, now)["tokens generated"] is None, "no time has passed"
    again = look_of(snapshot(worker("d-1", 5)), "", 13.0)
    assert rates(now, again)["tokens generated"] == 0.0, "it counts from 0 again"


def test_stores_show_what_is_kept_and_where_blocks_were_found() -> None:
    text = shown(None, look_of(snapshot(worker("d-1", 1)), METRICS, 1.0))
    (line,) = [line.split() for line in text.splitlines() if line.startswith("s-1")]
    assert line == ["s-1", "40", "of", "100", "36", "4", "2", "40", "75%", "10%"]
    assert "tokens generated -/s" in text
    assert "queue by level  2 0" in text


def test_the_gateways_own_metrics_can_be_read() -> None:
    look = look_of(snapshot(worker("d-1", 1)), FrontMetrics().render({}).decode(), 1.0)
    assert "slots used" not in shown(None, look), "without stores there is no table of them"


def test_a_worker_s_state_is_told() -> None:
    workers = (
        worker("d-1", 1, draining=True),
        worker("d-2", 1, duty="none"),
        worker("d-3", 1),
    )
    text = shown(None, look_of(snapshot(*workers), "", 1.0))
    states = {line.split()[0]: line.split()[-1] for line in text.splitlines() if "d-" in line}
    assert states == {"d-1": "leaving", "d-2": "drained", "d-3": "up"}


def test_a_look_that_fails_is_told_and_the_next_one_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries = iter([snapshot(worker("d-1", 1)), ConfigError("nothing answers"), KeyboardInterrupt()])

    def look(*_: Any) -> Any:
        answer = next(tries)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(top_command, "get_json", look)
    monkeypatch.setattr(top_command, "get_text", lambda *_: METRICS)
    monkeypatch.setattr("time.sleep", lambda _: None)
    watch("http://nowhere", every_s=1)
    assert "nothing answers" in capsys.readouterr().out
