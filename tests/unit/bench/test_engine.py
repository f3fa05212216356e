"""``bench.engine``: which shapes are compared with what, and that nothing is promised alone."""

import argparse

import pytest

from bench import engine
from bench.engine import EIGHT, MIXED, ONE, PREFILL, SHAPES, Samples, Shape
from bench.frame import Options, Row
from bench.peers import bench_vllm


def table(monkeypatch: pytest.MonkeyPatch, *argv: str, missing: str = "") -> list[Row]:
    """With processes that answer at once: vLLM half as fast as ours, llama.cpp a quarter."""
    order: list[str] = []

    def ours(samples: Samples, quantization: str, *, seed: int) -> None:
        order.append(quantization)
        for shape in SHAPES:
            samples.rates[shape].append(400.0 + seed)
        samples.step_rates.append(400.0)
        samples.best_rates.append(400.0)
        samples.limit_rates.append(500.0)
        samples.load_s.append(7.0)
        samples.overhead_mib.append(300.0)

    def vllm(samples: Samples, *, seed: int, repeat: int) -> None:
        order.append("vllm")
        for shape in SHAPES:
            samples.rates[shape] += [200.0] * repeat

    def llama(samples: Samples) -> None:
        order.append("llama")
        samples.step_rates.append(100.0)
        samples.rates[PREFILL].append(100.0)

    monkeypatch.setattr(engine, "_measure_ours", ours)
    monkeypatch.setattr(engine, "_measure_vllm", vllm)
    monkeypatch.setattr(engine, "_measure_llama", llama)
    monkeypatch.setattr(engine, "peer_missing", lambda _: missing)
    parser = argparse.ArgumentParser()
    engine.add_arguments(parser)
    rows = list(engine.measure(Options(True, parser.parse_args(argv))))
    assert order[0] == "none", "peers run between ours"
    assert order[-1] != "vllm"
    return rows


def test_every_shape_stands_beside_vllm_and_the_bars_where_they_were_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = {(made.name, made.reference): made for made in table(monkeypatch)}
    for shape in SHAPES:
        made = rows[(f"{shape.name}, bf16", "vLLM, bf16")]
        assert made.ratio is not None
        assert made.ratio > 2
    assert rows[(f"{ONE.name}, 4-bit file", "vLLM, bf16")].bar == "≥ 2.3×"
    assert rows[(f"{ONE.name}, 4-bit file", "vLLM, bf16")].holds is False
    assert rows[(f"{ONE.name}, bf16", "vLLM, bf16")].bar == ""
    assert rows[(f"{EIGHT.name}, bf16", "vLLM, bf16")].holds
    assert rows[(f"{MIXED.name}, bf16", "vLLM, bf16")].holds
    assert rows[(f"{PREFILL.name}, bf16, at best", "its matrices alone")].holds
    assert rows[("start to first token, bf16", "")].holds is False
    assert rows[("resident beside weights and cache, bf16", "")].holds


@pytest.mark.parametrize(
    ("argv", "missing"), [((), "no vLLM here"), (("--only", "ours"), "")], ids=["missing", "ours"]
)
def test_without_peers_nothing_is_promised_beside_them(
    monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], missing: str
) -> None:
    rows = table(monkeypatch, *argv, missing=missing)
    assert {made.reference for made in rows} == {"", "its matrices alone"}
    skipped = {made.name: made.skipped for made in rows if made.value is None}
    assert set(skipped) == {"all of it beside vLLM", "beside llama.cpp"}
    assert set(skipped.values()) == {missing or "--only ours"}


def test_shapes_are_those_of_the_peer() -> None:
    theirs = [
        Shape(one.requests, one.prompt_tokens, one.generated_tokens) for one in bench_vllm.SHAPES
    ]
    assert list(SHAPES) == theirs


@pytest.mark.parametrize(
    ("shape", "name", "tokens"),
    [
        (PREFILL, "prefill, 1 × 512", 512),
        (EIGHT, "decode, 8 × 129", 8 * 129),
        (MIXED, "16 × (512 in, 128 out)", 16 * 128),
    ],
)
def test_a_rate_counts_prompts_or_what_is_generated(shape: Shape, name: str, tokens: int) -> None:
    assert (shape.name, shape.tokens) == (name, tokens)
