"""The life of a request: every pair of phase and event, and the shape of the whole."""

import itertools

import pytest

from pdserve.errors import IllegalTransition
from pdserve.lifecycle import TERMINAL, TRANSITIONS, Event, Phase, advance


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(Phase, Event)))
def test_every_pair_either_moves_or_is_refused(phase: Phase, event: Event) -> None:
    if event in TRANSITIONS[phase]:
        assert advance(phase, event) is TRANSITIONS[phase][event]
    else:
        with pytest.raises(IllegalTransition, match=f"{event} while {phase}"):
            advance(phase, event)


def test_terminal_phases_are_exactly_those_without_a_way_out() -> None:
    assert {phase for phase in Phase if not TRANSITIONS[phase]} == TERMINAL


def test_every_phase_is_reachable() -> None:
    reachable = {Phase.QUEUED}
    for _ in Phase:
        reachable |= {target for phase in reachable for target in TRANSITIONS[phase].values()}
    assert reachable == set(Phase)


@pytest.mark.parametrize("phase", sorted(set(Phase) - TERMINAL))
def test_a_client_may_go_and_we_may_give_up_at_any_time(phase: Phase) -> None:
    assert advance(phase, Event.CLIENT_GONE) is Phase.ABORTED
    assert advance(phase, Event.GAVE_UP) is Phase.FAILED


@pytest.mark.parametrize("phase", sorted(set(Phase) - TERMINAL - {Phase.QUEUED}))
def test_a_lost_worker_means_admission_again(phase: Phase) -> None:
    assert advance(phase, Event.WORKER_LOST) is Phase.QUEUED


def walk(*events: Event) -> Phase:
    phase = Phase.QUEUED
    for event in events:
        phase = advance(phase, event)
    return phase


@pytest.mark.parametrize(
    ("events", "end"),
    [
        ((Event.DISPATCHED, Event.PREFILL_DONE, Event.ADOPTED, Event.ENDED), Phase.FINISHED),
        ((Event.DISPATCHED, Event.ENDED), Phase.FINISHED),
        ((Event.DISPATCHED, Event.PREEMPTED, Event.DISPATCHED), Phase.PREFILLING),
        ((Event.DISPATCHED, Event.PREFILL_DONE, Event.PARKED, Event.RESUMED), Phase.HANDING_OFF),
        (
            (Event.DISPATCHED, Event.PREFILL_DONE, Event.ADOPTED, Event.PARKED),
            Phase.PARKED,
        ),
    ],
)
def test_the_lives_that_the_diagram_shows_are_possible(
    events: tuple[Event, ...], end: Phase
) -> None:
    assert walk(*events) is end


@pytest.mark.parametrize("phase", sorted(TERMINAL))
def test_a_refusal_says_that_the_phase_is_terminal(phase: Phase) -> None:
    with pytest.raises(IllegalTransition, match="none, it is terminal"):
        advance(phase, Event.ENDED)


@pytest.mark.parametrize("name", [*Phase, *Event])
def test_what_equals_its_name_has_its_hash(name: Phase | Event) -> None:
    assert {str(name.value): True}[name]


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TRANSITIONS[Phase.QUEUED] = {}  # type: ignore[index]
