import random
import statistics

import pytest

from bench.decode_study import (
    OrderName,
    decode_study,
    reasoning_mix,
    saturated_rate_per_s,
    study_costs,
)
from pdserve.router.decode_orders import Stream, Swap
from pdserve.router.decode_orders import decode_order_of as order_of

COSTS = study_costs()


def mixed(count: int) -> list[tuple[int, int]]:
    chance = random.Random(3)
    return [(chance.randrange(10, 400), chance.choice((5, 8, 200))) for _ in range(count)]


def step_s(sequences: int, context: int) -> float:
    return 0.012 + 2.4e-8 * context + 5e-5 * sequences


def test_alone_an_answer_takes_its_steps_one_by_one() -> None:
    expected = sum(step_s(1, 1000 + step) for step in range(50))
    result = decode_study([(1000, 50)], "fcfs", 0.5, 4, 1 << 20, 1, rate_per_s=1.0)
    assert result["mean_jct_s"] == pytest.approx(expected, rel=1e-6)
    assert result["moves_per_request"] == result["swap_bytes"] == 0


def test_saturation_is_a_full_batch() -> None:
    rate = saturated_rate_per_s([(100, 10)] * 100, 4, 1 << 20, COSTS)
    assert rate == pytest.approx(4 / (10 * step_s(4, 4 * 105)), rel=0.05)


def test_where_memory_runs_out_who_came_last_is_parked_and_all_end() -> None:
    lengths = [(100, 400)] * 6
    result = decode_study(lengths, "fcfs", 1.0, 8, 1000, 1, rate_per_s=100.0)
    assert result["moves_per_request"] > 0
    assert result["swap_bytes"] > 0


@pytest.mark.parametrize("name", ["gated", "fcfs", "mlfq", "oracle"])
def test_every_order_ends_every_request_and_equal_seeds_agree(name: OrderName) -> None:
    lengths = mixed(150)
    first = decode_study(lengths, name, 1.2, 2, 1 << 20, 5)
    assert first == decode_study(lengths, name, 1.2, 2, 1 << 20, 5)
    assert first["p99_jct_s"] >= first["mean_jct_s"] > 0


def test_knowing_all_lengths_helps_where_they_differ() -> None:
    lengths = mixed(200)
    fcfs = decode_study(lengths, "fcfs", 1.2, 2, 1 << 20, 5)
    oracle = decode_study(lengths, "oracle", 1.2, 2, 1 << 20, 5)
    assert oracle["mean_jct_s"] < 0.6 * fcfs["mean_jct_s"]
    assert oracle["moves_per_request"] > 0


def test_without_load_the_gate_changes_nothing() -> None:
    lengths = mixed(150)
    gated = decode_study(lengths, "gated", 0.2, 16, 1 << 20, 5)
    assert gated == decode_study(lengths, "fcfs", 0.2, 16, 1 << 20, 5)


def test_what_never_asks_to_park_is_never_parked_where_memory_suffices() -> None:
    class Refusing:
        def __init__(self) -> None:
            self.asked = 0
            self.fcfs = order_of("fcfs", COSTS, moves_max=0)
            self.finished = self.fcfs.finished

        def resume_order(self, parked: list[Stream], now_ns: int) -> list[Stream]:
            return self.fcfs.resume_order(parked, now_ns)

        def swaps(self, *_: object) -> list[Swap]:
            self.asked += 1
            return []

    order = Refusing()
    lengths = mixed(100)
    result = decode_study(lengths, "gated", 1.2, 2, 1 << 20, 5, order=order)  # type: ignore[arg-type]
    assert result["moves_per_request"] == 0
    assert order.asked > 100


def test_the_mix_varies_as_much_as_it_says() -> None:
    outputs = [output for _, output in reasoning_mix(20_000, 1)]
    mean = statistics.mean(outputs)
    assert statistics.pstdev(outputs) / mean == pytest.approx(2.6, rel=0.1)
