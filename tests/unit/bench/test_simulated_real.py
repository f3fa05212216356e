"""What is compared is the same load: on both sides."""

from dataclasses import replace

import pytest

from bench import simulated_real
from bench.peers.mixed_load import mixed
from bench.servers import Ours
from pdserve.cluster.profiles import Profile, Size
from pdserve.router.costs import believed
from tests.unit.bench.outcomes import outcome

LOAD = mixed(rate_per_s=5.0, seconds=20, seed=3, long_share=0.3)


def test_the_simulator_gets_the_arrivals_that_were_sent() -> None:
    trace = simulated_real._trace(LOAD)
    assert len(trace.requests) == len(LOAD)
    assert trace.requests[0].arrival_ns == 0
    for request, before, arrival in zip(trace.requests[1:], LOAD, LOAD[1:], strict=False):
        assert request.prompt_tokens == arrival.lengths.prompt_tokens
        assert request.generated_tokens == arrival.lengths.generated_tokens
        assert arrival.due_s >= before.due_s


def test_what_a_request_takes_beyond_its_prefill_is_added_once() -> None:
    form = Ours("disaggregated", "fcfs")
    profile = Profile(believed(10_000), Size())
    rounds = [simulated_real.Round(LOAD, profile)]
    ttft_s, tpot_s = simulated_real._simulated(form, rounds, 0.0)
    later = simulated_real._simulated(form, rounds, 0.5)
    assert later[0] == pytest.approx(ttft_s + 0.5)
    assert later[1] == tpot_s


@pytest.mark.parametrize("mode", ["aggregated", "disaggregated"])
def test_slowdowns_are_found_from_how_long_workers_were_busy(mode: str) -> None:
    form = Ours(mode, "fcfs")  # type: ignore[arg-type]
    profile = Profile(believed(1500), Size())
    real = replace(profile, prefill_slowdown=1.17, decode_slowdown=1.42)
    loads = simulated_real.learning_loads(3.0, 0.2, seconds=60, seed=5)
    busy_us = [
        simulated_real._played(form, load, real).counters["simulated_busy_us"] for load in loads
    ]
    learned = simulated_real.slowed(profile, form, loads, [each / 1e6 for each in busy_us])
    assert learned.prefill_slowdown == pytest.approx(1.17, abs=0.02)
    assert learned.decode_slowdown == pytest.approx(1.42, abs=0.02)


def test_it_is_learned_from_loads_in_which_chats_and_long_prompts_do_not_meet() -> None:
    chats, longs = simulated_real.learning_loads(4.0, 0.25, seconds=100, seed=1)
    assert {each.kind for each in chats} == {"chat"}
    assert {each.kind for each in longs} == {"long"}
    assert len(chats) == pytest.approx(300, rel=0.2)
    assert len(longs) == pytest.approx(100, rel=0.3)


def test_policies_are_ranked_by_the_mean_of_the_first_token() -> None:
    assert simulated_real._ranked({"a": (2.0, 0.1), "b": (1.0, 0.9)}) == ["b", "a"]


def test_real_means_are_over_requests() -> None:
    outcomes = [outcome("chat", ttft_s=1.0, gaps_s=(0.1, 0.3)), outcome("chat", ttft_s=3.0)]
    ttft_s, _ = simulated_real._real(outcomes)
    assert ttft_s == 2.0


def test_the_profile_is_of_the_workers_that_serve() -> None:
    form = Ours("aggregated", "fcfs", (("decode.threads", "1"),))
    served = {each for each in form.command(1) if each.startswith("--set=")}
    assert {"--set=model.quantization=none", "--set=decode.threads=1"} <= served
    left_out = served - set(simulated_real.profile_command(form))
    assert left_out == {"--set=tcp=false"}  # how nodes talk: a worker alone does not
