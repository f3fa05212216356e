"""``pdserve chaos`` on a real cluster: what it strikes, what it says, that it would say more."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.cluster.chaos import load, plan
from pdserve.cluster.chaos.run import ChaosReport, find, strike_cluster
from pdserve.cluster.commands.chaos import chaos
from pdserve.config import ClusterConfig
from pdserve.errors import ConfigError
from tests.faults import rows
from tests.integration.harness import TestCluster, wait_for

SEED = 2
SECONDS = float(os.environ.get("FAULTS_CHAOS_S", "20"))
"""A strike every six seconds."""


def test_nothing_is_touched_without_leave(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--yes"):
        chaos(
            ClusterConfig(),
            url="http://127.0.0.1:1",
            seed=SEED,
            seconds=SECONDS,
            kinds=("kill",),
            local=False,
            allowed=False,
            json_file=None,
        )
    assert "kill" in capsys.readouterr().out, "it says what it would do"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_struck_cluster_keeps_its_promises(cluster: TestCluster, tmp_path: Path) -> None:
    before = find(cluster.url)
    assert all(before[role] for role in (*plan.ROLES, "gateway"))
    strikes = plan.drawn(SEED, seconds=SECONDS, kinds=("kill", "stop"))
    assert {strike.kind for strike in strikes} == {"kill", "stop"}
    report = strike_cluster(
        cluster.url, seed=SEED, seconds=SECONDS, strikes=strikes, progress=print
    )
    assert report.verdict.good, report.text()
    assert report.verdict.answers >= load.QUESTIONS
    report.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["good"] is True
    wait_for("everybody", lambda: all(find(cluster.url)[role] for role in plan.ROLES))
    rows.enter(
        "F24",
        f"{len(strikes)} faults in {SECONDS:.0f} s, drawn from a seed: workers, router and store "
        "killed or stopped",
        f"4 clients, {report.verdict.answers} requests",
        "0 wrong, 0 lost",
        seed=SEED,
        whole=report.verdict.answers,
    )


@pytest.mark.slow
def test_a_changed_token_would_be_seen(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run, with one bit of one answer changed between cluster and checker."""
    honest, count = load.ask_http, 0

    def dishonest(url: str) -> load.Ask:
        ask = honest(url)

        def asked(question: load.Question) -> load.Answer:
            nonlocal count
            answer = ask(question)
            count += 1
            if count == load.QUESTIONS + 3:
                answer.tokens[-1] ^= 1
            return answer

        return asked

    monkeypatch.setattr(load, "ask_http", dishonest)
    report: ChaosReport = strike_cluster(cluster.url, seed=SEED, seconds=6.0, strikes=())
    assert len(report.verdict.wrong) == 1
    assert not replace(report.verdict, lost=(), held={}).good
