"""Table, JSON and page of a small study."""

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from pdserve.router_config import RouterConfig
from pdserve.simulator.charts import Axis, axis, number, points
from pdserve.simulator.page import page
from pdserve.simulator.report import HEADINGS, SHORT, Case, Goal, as_json, rows
from pdserve.simulator.run import SimulationSettings, simulate
from pdserve.simulator.synthetic import always, exponential, poisson
from pdserve.simulator.transformations import scale_time

GOAL = Goal(ttft_s=0.5, tpot_s=0.05)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    trace = poisson(60, 4.0, seed=1, prompt=exponential(4000), generated=exponential(20))
    settings = SimulationSettings(prefill_workers=2, decode_workers=1)
    return [
        Case(
            policy,
            load,
            simulate(
                scale_time(trace, load),
                replace(settings, router=RouterConfig(policy=policy)),
            ),
        )
        for policy in ("fcfs", "skip_join")
        for load in (0.5, 1.0)
    ]


def test_the_table_has_a_cell_for_every_heading(cases: list[Case]) -> None:
    table = rows(cases, GOAL)
    assert [row[:2] for row in table] == [
        ("fcfs", "0.5"),
        ("fcfs", "1"),
        ("skip_join", "0.5"),
        ("skip_join", "1"),
    ]
    assert {len(row) for row in table} == {len(HEADINGS)} == {len(set(HEADINGS))}
    assert set(SHORT) <= set(HEADINGS)


def test_json_says_what_was_found_and_comes_back(cases: list[Case]) -> None:
    tree = as_json(cases, GOAL, trace="t.jsonl", seed=7)
    assert json.loads(json.dumps(tree)) == tree
    found = tree["cases"][0]
    assert found["ttft_s"]["p50"] <= found["ttft_s"]["p99"] <= found["ttft_s"]["max"]
    assert 0 <= found["good_ratio"] <= 1
    assert found["finished"] == 60


def svgs(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_the_page_is_whole_draws_every_chart_and_loads_nothing(cases: list[Case]) -> None:
    text = page(cases, GOAL, title="A <study>")
    assert "A &lt;study&gt;" in text
    assert "<study>" not in text
    assert "<script" not in text
    assert not re.search(r"https?:|@import|url\(", text)
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == [
        "Time to first token",
        "Time per token after it",
        "Waiting in the router: fcfs",
        "Waiting in the router: skip_join",
        "Goodput against load",
        "Mean against tail",
    ]
    charts = svgs(text)
    assert len(charts) == len(titles)
    for chart in charts:
        assert chart.findall(".//path[@class='axis']")
        for x in [float(text.get("x", "0")) for text in chart.findall("text")]:
            assert 0 <= x <= 640


def test_one_case_alone_has_neither_goodput_curve_nor_front(cases: list[Case]) -> None:
    titles = re.findall(r"<h2>(.*?)</h2>", page(cases[:1], GOAL, title="one"))
    assert "Goodput against load" not in titles
    assert "Mean against tail" not in titles


def test_a_study_in_which_nothing_was_finished_still_has_a_page(cases: list[Case]) -> None:
    trace = poisson(3, 4.0, seed=1, prompt=always(400_000))
    nothing = simulate(trace, SimulationSettings(prefill_workers=1, timeout_s=0.001))
    assert not nothing.finished.any()
    assert svgs(page([Case("fcfs", 1.0, nothing)], GOAL, title="none"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"),
        (0.00123, "0.00123"),
        (12.345, "12.3"),
        (999.7, "1,000"),
        (123456.0, "123,456"),
        (2e7, "2.0e+07"),
        (1e-5, "1.0e-05"),
        (float("nan"), "–"),
    ],
)
def test_numbers_are_written_as_people_read_them(value: float, said: str) -> None:
    assert number(value) == said


def test_axes_hold_their_values_and_have_round_ticks() -> None:
    assert axis("s", [0.03, 47.0], log=True) == Axis("s", 0.01, 100.0, log=True)
    assert axis("s", [0.03, 47.0], log=True).ticks() == pytest.approx([0.01, 0.1, 1.0, 10.0, 100.0])
    assert axis("s", [3.0, 47.0]).ticks() == [0.0, 10.0, 20.0, 30.0, 40.0]
    assert axis("s", []).ticks()[0] == 0.0
    assert axis("s", [5.0], log=True).place(5.0) == pytest.approx(0.69897)


def test_the_front_joins_those_that_nobody_beats() -> None:
    chart = points(
        axis("x", [4.0]), axis("y", [4.0]), [("a", 1, 3), ("b", 2, 4), ("c", 3, 1)], title="t"
    )
    front = next(p for p in ElementTree.fromstring(chart).iter("path") if p.get("class") == "front")
    assert front.get("d", "").count("L") == 1
