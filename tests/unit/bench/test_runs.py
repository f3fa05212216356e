"""Results that are kept: what is measured again, and what is not. And how servers are started."""

from pathlib import Path

import pytest

from bench import runs
from bench.runs import Work, take_turns
from bench.servers import Ours, Vllm, vllm_missing

OURS = Ours("disaggregated", "skip_join")
VLLM = Vllm(512, 128, chats_first=True)


class Counted:
    """Something to measure, that counts how often it was."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, int]:
        self.times += 1
        return {"times": self.times}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setattr(runs, "commit", lambda: "abc")
    monkeypatch.setattr(runs, "source_digest", lambda package: "1")
    return Work(tmp_path / "work")


def test_what_was_measured_is_not_measured_again_not_even_by_the_next_run(
    work: Work, tmp_path: Path
) -> None:
    measure = Counted()
    assert work.remembered(OURS, ["load", 1], measure) == {"times": 1}
    assert work.remembered(OURS, ["load", 1], measure) == {"times": 1}
    assert Work(tmp_path / "work").remembered(OURS, ["load", 1], measure) == {"times": 1}


def test_another_load_or_form_is_measured(work: Work) -> None:
    measure = Counted()
    for form, about in ((OURS, 1), (OURS, 2), (Ours("aggregated", "skip_join"), 1), (VLLM, 1)):
        work.remembered(form, about, measure)
    assert measure.times == 4


def test_other_code_measures_ours_again_and_the_peer_not(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = Counted(), Counted()
    for digest in ("1", "2"):
        monkeypatch.setattr(runs, "source_digest", lambda package, digest=digest: digest)
        again = Work(tmp_path / "work")
        again.remembered(OURS, 1, ours)
        again.remembered(VLLM, 1, theirs)
    assert (ours.times, theirs.times) == (2, 1)


def test_code_is_told_apart_by_names_and_contents_and_by_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    code = tmp_path / "folder" / "one.py"
    code.write_text("x = 1\n")
    before = runs.source_digest(tmp_path)
    (tmp_path / "one.pyc").write_bytes(b"cached")
    assert runs.source_digest(tmp_path) == before
    code.write_text("x = 2\n")
    changed = runs.source_digest(tmp_path)
    code.rename(code.with_name("two.py"))
    assert len({before, changed, runs.source_digest(tmp_path)}) == 3


def test_a_measurement_that_fails_leaves_nothing_behind(work: Work, tmp_path: Path) -> None:
    def failing() -> None:
        raise OSError("interrupted")

    with pytest.raises(OSError, match="interrupted"):
        work.remembered(OURS, 1, failing)
    assert work.remembered(OURS, 1, Counted()) == {"times": 1}


def test_each_form_begins_a_round_in_its_turn() -> None:
    rounds = [take_turns([OURS, VLLM], index) for index in range(3)]
    assert rounds == [[OURS, VLLM], [VLLM, OURS], [OURS, VLLM]]


def test_our_server_is_started_as_its_name_says() -> None:
    command = OURS.command(port=1234)
    assert {"--http-port=1234", "--set=model.dtype=bfloat16"} <= set(command)
    assert {"--set=router.mode=disaggregated", "--set=router.policy=skip_join"} <= set(command)


@pytest.mark.parametrize(
    ("setting", "budget", "policy"),
    [
        (VLLM, ["--max-num-batched-tokens=512"], "priority"),
        (Vllm(None, 128, chats_first=False), [], "fcfs"),
    ],
)
def test_vllm_is_started_as_its_setting_says(setting: Vllm, budget: list[str], policy: str) -> None:
    command = setting.command(port=1234)
    assert [part for part in command if "batched" in part] == budget
    assert "--long-prefill-token-threshold=128" in command
    assert f"--scheduling-policy={policy}" in command
    assert "--dtype=bfloat16" in command


def test_where_vllm_is_missing_it_is_said_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDSERVE_PEERS", str(tmp_path))
    assert vllm_missing() == f"no vLLM in {tmp_path}: run bench/peers/setup.sh model vllm"
    for file in ("vllm/bin/python", "model/hf/model.safetensors"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    assert vllm_missing() == ""
