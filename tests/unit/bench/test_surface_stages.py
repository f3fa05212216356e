"""Stages of a first token: they add up, and one that is missing spoils its own request only."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.surface_stages import LAST, NS_PER_US, STAGES, Stage, found, own_us, stages_of

PLACES = sorted({stage.place for stage in STAGES})


def noted(requests: list[list[int]]) -> dict[str, dict[str, list[int]]]:
    """What the processes would leave behind; of each request when its stages ended."""
    stamps: dict[str, dict[str, list[int]]] = {place: {} for place in PLACES}
    for index, stage in enumerate(STAGES):
        stamps[stage.place][stage.name] = [ends[index] for ends in requests]
    return stamps


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_ends_in_a_function_that_there_is(stage: Stage) -> None:
    *_, function = found(stage)
    assert callable(function)


gaps_ns = st.lists(st.integers(1, 10**7), min_size=len(STAGES) + 1, max_size=len(STAGES) + 1)


@given(st.lists(gaps_ns, min_size=1, max_size=4))
def test_the_stages_of_a_request_are_what_its_client_waited(gaps: list[list[int]]) -> None:
    now_ns, requests, ends = 0, [], []
    for each in gaps:
        sent_ns = now_ns
        ends.append([now_ns := now_ns + gap for gap in each[:-1]])
        now_ns += each[-1]
        requests.append((sent_ns, now_ns))
        now_ns += 1
    stages = stages_of(requests, noted(ends))
    assert [*stages] == [*(stage.name for stage in STAGES), LAST]
    for index, samples in enumerate(stages.values()):
        assert samples == [each[index] / NS_PER_US for each in gaps]


def test_a_request_that_lacks_a_stage_is_left_out() -> None:
    count = len(STAGES)
    first, second = [*range(1, count + 1)], [*range(101, 101 + count)]
    stamps = noted([first, second])
    missing = STAGES[3]
    stamps[missing.place][missing.name] = [second[3]]
    stages = stages_of([(0, 50), (100, 150)], stamps)
    assert {len(samples) for samples in stages.values()} == {1}


def test_the_gateway_s_own_is_neither_the_way_to_it_nor_the_others() -> None:
    stages = {stage.name: [float(index)] for index, stage in enumerate(STAGES)} | {LAST: [1e9]}
    mine = [
        stages[stage.name][0]
        for stage in STAGES
        if stage.place == "gateway-0" and "the gateway" not in stage.name
    ]
    assert own_us(stages) == sum(map(statistics.median, [[value] for value in mine]))
