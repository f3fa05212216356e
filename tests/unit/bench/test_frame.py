"""The frame of the benchmarks: what a row says, and what a run leaves behind."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import frame
from bench.frame import Options, Row, at_least, at_most, cells, interleave, percentile, row, run


@pytest.fixture(autouse=True)
def _no_subprocess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "_output", lambda *command: "")


def test_a_row_compares_medians() -> None:
    made = row(
        "step",
        [1, 2, 30],
        "ms",
        reference="bare loop",
        reference_samples=[1, 1, 9],
        bar=at_most(1.5, of="ratio"),
    )
    assert (made.value, made.reference_value, made.ratio) == (2, 1, 2)
    assert (made.bar, made.holds) == ("≤ 1.5×", False)


def test_a_row_compares_percentiles_where_told() -> None:
    made = row("p99", range(1, 101), "ms", reference="bare", reference_samples=[1, 33], at=0.99)
    assert (made.value, made.reference_value, made.ratio) == (99, 33, 3)


@pytest.mark.parametrize(
    ("bar", "holds", "text"),
    [
        (at_most(2), True, "≤ 2 ms"),
        (at_most(1.9), False, "≤ 1.9 ms"),
        (at_least(2), True, "≥ 2 ms"),
        (at_least(2.1), False, "≥ 2.1 ms"),
        (at_most(1, of="ratio"), False, "≤ 1×"),  # without a reference there is no ratio
    ],
)
def test_a_bar_says_what_it_wants_and_whether_it_holds(
    bar: frame.Bar, holds: bool, text: str
) -> None:
    made = row("step", [2.0], "ms", bar=bar)
    assert (made.holds, made.bar) == (holds, text)


def test_without_a_bar_nothing_is_promised() -> None:
    made = row("step", [2.0], "ms")
    assert (made.bar, made.holds, made.ratio) == ("", None, None)


@pytest.mark.parametrize(
    ("ratio", "value"), [(0, 1), (0.1, 1), (0.5, 5), (0.51, 6), (0.99, 10), (1, 10)]
)
def test_percentiles_are_samples(ratio: float, value: int) -> None:
    assert percentile(range(10, 0, -1), ratio) == value


def test_interleaving_takes_turns_and_turns_them_round() -> None:
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return len(order)

    samples = interleave(2, ours=lambda: measure("ours"), theirs=lambda: measure("theirs"))
    assert order == ["ours", "theirs", "theirs", "ours"]
    assert samples == {"ours": [1, 4], "theirs": [2, 3]}


def test_quick_is_a_fifth_and_three_at_least() -> None:
    quick = Options(True, None)  # type: ignore[arg-type]
    full = Options(False, None)  # type: ignore[arg-type]
    assert [quick.rounds(n) for n in (100, 10)] == [20, 3]
    assert full.rounds(100) == 100


def test_a_run_prints_the_table_and_writes_the_same_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(options: Options) -> Iterator[Row]:
        assert options.quick
        assert options.arguments.tokens == 7
        yield row("step", [2.0, 2.0], "ms", bar=at_most(3))
        yield frame.skipped("kernel", "µs", "needs a CUDA device")

    file = tmp_path / "rows.json"
    run(
        "engine",
        measure,
        add_arguments=lambda parser: parser.add_argument("--tokens", type=int),  # type: ignore[arg-type]
        argv=["--quick", "--json", str(file), "--tokens", "7"],
    )
    said = capsys.readouterr().out
    assert "2.00 ms" in said
    assert "≤ 3 ms" in said
    assert "holds" in said
    assert "needs a CUDA device" in said
    written = json.loads(file.read_text())
    assert {"area", "machine", "commit", "date", "rows"} == set(written)
    assert written["machine"]["cores"] >= 1
    assert [item["name"] for item in written["rows"]] == ["step", "kernel"]
    wanted = {"name", "value", "unit", "reference", "reference_value", "ratio", "bar", "holds"}
    assert wanted <= set(written["rows"][0])


def test_what_was_measured_before_a_part_failed_is_kept(tmp_path: Path) -> None:
    def measure(_: Options) -> Iterator[Row]:
        yield row("step", [2.0], "ms")
        raise RuntimeError("the next part")

    file = tmp_path / "rows.json"
    with pytest.raises(RuntimeError, match="the next part"):
        run("engine", measure, argv=["--json", str(file)])
    assert [item["name"] for item in json.loads(file.read_text())["rows"]] == ["step"]


def test_a_missed_bar_is_named_and_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("engine", lambda options: [row("step", [4.0], "ms", bar=at_most(3))], argv=[])
    assert ended.value.code == 1
    assert "missed: step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12,346")],
)
def test_numbers_show_what_counts(value: float, text: str) -> None:
    assert cells(Row("x", value, "ms"))[1] == text


def test_an_interval_stands_behind_its_ratio() -> None:
    assert cells(Row("x", 1, "ms", ratio=0.5, ratio_interval=(0.456, 0.6)))[6] == "0.50× 0.46–0.60"
    assert cells(Row("x", 1, "ms", ratio=0.5))[6] == "0.50×"
