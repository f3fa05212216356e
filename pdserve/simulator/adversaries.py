"""Loads and failures meant to break a scheduler, each with the promise that it attacks.

Sizes are chosen for ``PROMPT_TOKENS_PER_S``, a round figure near what one worker of the study costs
computes; how much of ``workers`` a scenario asks for is said with each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from pdserve.clock import S
from pdserve.messages import Role
from pdserve.simulator.settings import Death, Failure, Noise, SimulationSettings, Slowdown
from pdserve.simulator.synthetic import always, either, exponential, merged, poisson
from pdserve.simulator.traces import Trace, TraceRequest

PROMPT_TOKENS_PER_S = 10_000
POISON_BLOCK_TOKENS = 512
"""As in Mooncake's traces: with blocks of 16 half a million prompts would be 150 million keys."""

VICTIM = "victim"
FLOODER = "flooder"


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    trace: Trace
    noise: Noise = Noise()  # noqa: RUF009  (frozen)
    failures: tuple[Failure, ...] = ()

    def in_settings(self, settings: SimulationSettings) -> SimulationSettings:
        return replace(settings, noise=self.noise, failures=self.failures)


def same_size(count: int, seed: int, workers: int) -> Scenario:
    """95 % load of equal prompts: no order is better than arrival, and none may be worse."""
    rate = 0.95 * workers * PROMPT_TOKENS_PER_S / 4000
    return Scenario("same size", poisson(count, rate, seed=seed, prompt=always(4000)))


def bimodal(count: int, seed: int, workers: int) -> Scenario:
    """One prompt in a hundred is a thousand times as long, 90 % load: starvation of the long."""
    sizes = either(100, 100_000, other_share=0.01)
    rate = 0.9 * workers * PROMPT_TOKENS_PER_S / (0.99 * 100 + 0.01 * 100_000)
    return Scenario("bimodal 1:1000", poisson(count, rate, seed=seed, prompt=sizes))


def sawtooth(count: int, seed: int, workers: int) -> Scenario:
    """Ten seconds' work arrives at once every ten seconds, half of it: levels fill and empty."""
    burst = max(1, workers * PROMPT_TOKENS_PER_S * 5 // 2000)
    sizes = poisson(count, 1.0, seed=seed, prompt=exponential(2000)).requests
    requests = [
        replace(request, arrival_ns=index // burst * 10 * S) for index, request in enumerate(sizes)
    ]
    return Scenario("sawtooth", Trace(tuple(requests), 16, "sawtooth"))


def tenant_flood(count: int, seed: int, workers: int) -> Scenario:
    """One tenant asks for ten times what another does, together twice what there is."""
    rate = 2.0 * workers * PROMPT_TOKENS_PER_S / 2000 / 11
    victims = max(1, count // 11)
    sizes = exponential(2000)
    return Scenario(
        "tenant flood",
        merged(
            "tenant flood",
            poisson(victims, rate, seed=seed, prompt=sizes, tenant=VICTIM),
            poisson(count - victims, 10 * rate, seed=seed + 1, prompt=sizes, tenant=FLOODER),
        ),
    )


def cache_poison(count: int, seed: int, workers: int) -> Scenario:
    """Half the prompts have blocks that nobody will ask for again; the others share a prefix."""
    rate = 0.6 * workers * PROMPT_TOKENS_PER_S / 4000
    requests: list[TraceRequest] = []
    for index, request in enumerate(poisson(count, rate, seed=seed, prompt=always(4000)).requests):
        first = 0 if index % 2 else 1000 * (index + 1)
        blocks = tuple(range(first, first + 4000 // POISON_BLOCK_TOKENS))
        requests.append(replace(request, blocks=blocks))
    return Scenario("cache poison", Trace(tuple(requests), POISON_BLOCK_TOKENS, "cache poison"))


def size_lie(count: int, seed: int, workers: int) -> Scenario:
    """One prefill in ten takes eight times as long as anybody could predict."""
    rate = 0.5 * workers * PROMPT_TOKENS_PER_S / 2000
    trace = poisson(count, rate, seed=seed, prompt=exponential(2000))
    return Scenario("size lie", trace, noise=Noise(lie_share=0.1, lie_factor=8.0))


def slow_worker(count: int, seed: int, workers: int) -> Scenario:
    """The first prefill worker takes ten times as long from the start; 60 % of the load of all."""
    rate = 0.6 * workers * PROMPT_TOKENS_PER_S / 2000
    trace = poisson(count, rate, seed=seed, prompt=exponential(2000))
    return Scenario(
        "slow worker",
        trace,
        failures=(Slowdown(role=Role.PREFILL, index=0, factor=10.0),),
    )


def flapping_worker(count: int, seed: int, workers: int) -> Scenario:
    """The first prefill worker dies every five seconds and is back two seconds later."""
    rate = 0.5 * workers * PROMPT_TOKENS_PER_S / 2000
    trace = poisson(count, rate, seed=seed, prompt=exponential(2000))
    deaths = [
        Death(role=Role.PREFILL, index=0, at_ns=at_ns, back_after_ns=2 * S)
        for at_ns in range(5 * S, trace.span_ns, 5 * S)
    ]
    return Scenario("flapping worker", trace, failures=tuple(deaths))


SCENARIOS: Mapping[str, Callable[[int, int, int], Scenario]] = MappingProxyType(
    {
        make.__name__: make
        for make in (
            same_size,
            bimodal,
            sawtooth,
            tenant_flood,
            cache_poison,
            size_lie,
            slow_worker,
            flapping_worker,
        )
    }
)
"""By name: number of requests, seed, prefill workers."""
