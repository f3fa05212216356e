"""``pdserve autoscaler explain``: tables, recordings, dry runs; and the task behind it."""

import asyncio
import json
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pdserve.cluster.commands import autoscaler as autoscaler_command
from pdserve.cluster.commands.autoscaler import dry_run, explain, render, save
from pdserve.cluster.scaler import Scaler, plan_of
from pdserve.errors import ConfigError
from pdserve.messages import Role
from pdserve.router.scaling import Observation
from pdserve.settings import from_tree
from tests.unit.router.test_scaling import DECODE, PREFILL, late

SCALES = ["prefill.replicas=2", "prefill.replicas_max=6", "decode.replicas=2"]


def seen(at_s: int, *, is_late: bool) -> Observation:
    return Observation(at_s * 1000, 1, at_s, late() if is_late else PREFILL, DECODE)


OBSERVATIONS = {"observations": [asdict(seen(s, is_late=s > 10)) for s in range(30)]}


def answers(monkeypatch: pytest.MonkeyPatch, tree: Any) -> None:
    monkeypatch.setattr(autoscaler_command, "get_json", lambda *_: tree)


def test_a_dry_run_tells_when_another_policy_would_have_acted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch, OBSERVATIONS)
    dry_run("http://x", None, None, SCALES, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["observations"] == 30
    changes = [(one["pool"], one["before"], one["wanted"]) for one in said["changes"]]
    assert changes == [("prefill", 2, 4)], "then two are starting, as far as was seen"
    patient = [*SCALES, "autoscaling.queue_age_ms=5000"]
    dry_run("http://x", None, None, patient, as_json=False)
    assert "nothing would have changed" in capsys.readouterr().out


def test_what_was_saved_can_be_played_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch, OBSERVATIONS)
    file = tmp_path / "seen.json"
    save("http://x", file)
    answers(monkeypatch, {})
    dry_run("http://x", file, None, SCALES, as_json=False)
    assert "oldest has waited" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ConfigError, match="is there already"):
        save("http://x", file)


@pytest.mark.parametrize("text", ["no json", "{}", '{"observations": [{"at": 1}]}', "[1]"])
def test_a_file_that_is_no_recording_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"other\.json"):
        dry_run("http://x", file, None, [], as_json=False)
    with pytest.raises(ConfigError, match="cannot read"):
        dry_run("http://x", tmp_path / "none", None, [], as_json=False)


class Woken:
    """A scaler over observations that a test chooses."""

    def __init__(self, *settings: str, **autoscaling: object) -> None:
        pool = {"replicas": 0, "replicas_max": 2}
        config = from_tree({"prefill": pool, "decode": pool, "autoscaling": autoscaling})
        self.now = seen(0, is_late=False)
        self.woken: list[Role] = []
        self.scaler = Scaler(plan_of(config), observe=lambda: self.now, wake=self._wake)

    async def _wake(self, role: Role) -> None:
        self.woken.append(role)

    def look(self, observation: Observation) -> None:
        self.now = observation
        self.scaler._look()


def asleep(at_s: int, *, live: int) -> Observation:
    nobody = replace(PREFILL, workers=0, queued=live)
    return Observation(at_s * 1000, live, live, nobody, replace(DECODE, workers=0, blocks=0))


def test_pools_without_workers_are_woken_when_somebody_comes_and_not_before() -> None:
    async def run() -> None:
        one = Woken()
        for at_s in range(10):
            one.look(asleep(at_s, live=0))
        await asyncio.sleep(0)
        assert one.woken == []
        one.look(asleep(10, live=1))
        await asyncio.sleep(0)
        assert one.woken == [Role.PREFILL, Role.DECODE]
        assert one.scaler.wants() == {"prefill": 1, "decode": 1}

    asyncio.run(run())


def test_who_asks_for_the_model_wakes_it() -> None:
    async def run() -> None:
        one = Woken()
        one.look(asleep(0, live=0))
        one.scaler.asked()
        one.look(asleep(1, live=0))
        await asyncio.sleep(0)
        assert one.woken == [Role.PREFILL, Role.DECODE]

    asyncio.run(run())


def test_in_a_dry_run_it_explains_and_wants_nothing() -> None:
    one = Woken(dry_run=True)
    for at_s in range(10):
        one.look(seen(at_s, is_late=True))
    assert one.scaler.wants() == {}
    said = one.scaler.explain()
    assert said["dry_run"]
    assert json.loads(json.dumps(said)) == said
    shown = StringIO()
    Console(file=shown, width=220).print(render(said))
    assert "dry run: nothing is changed" in shown.getvalue()
    assert "replicas_max is 2" in shown.getvalue()


def test_explain_shows_changes_with_their_reasons(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = Woken()
    for at_s in range(8):
        one.look(replace(seen(at_s, is_late=False), decode=replace(DECODE, blocks=20)))
    for at_s in range(8, 60):
        one.look(replace(seen(at_s, is_late=False), decode=replace(DECODE, blocks=20)))
    answers(monkeypatch, one.scaler.explain())
    explain("http://x", as_json=False)
    assert "decode" in capsys.readouterr().out
    explain("http://x", as_json=True)
    changes = json.loads(capsys.readouterr().out)["changes"]
    assert [(c["pool"], c["before"], c["wanted"]) for c in changes] == [
        ("prefill", 2, 1),
        ("decode", 2, 1),
    ]
    assert one.scaler.observations()["observations"][-1]["at_ms"] == 59_000
