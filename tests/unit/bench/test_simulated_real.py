"""What is compared is the same load: on both sides."""

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
    rounds = [simulated_real.Round(LOAD, slowdown=1.0)]
    ttft_s, tpot_s = simulated_real._simulated(form, rounds, profile, 0.0)
    later = simulated_real._simulated(form, rounds, profile, 0.5)
    assert later[0] == pytest.approx(ttft_s + 0.5)
    assert later[1] == tpot_s


@pytest.mark.parametrize("mode", ["aggregated", "disaggregated"])
def test_the_slowdown_is_found_from_how_long_workers_were_busy(mode: str) -> None:
    form = Ours(mode, "fcfs")  # type: ignore[arg-type]
    profile = Profile(believed(10_000), Size())
    real = simulated_real._played(form, LOAD, profile, 1.37)
    busy_s = real.counters["simulated_busy_us"] / 1e6
    assert simulated_real._slowdown(busy_s, form, LOAD, profile) == pytest.approx(1.37, abs=0.01)


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
