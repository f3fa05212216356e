"""The engine alone on a CPU: beside vLLM's CPU build, llama.cpp, and its own matrices.

    python -m bench.engine [--quick] [--rounds 3] [--only ours] [--json FILE]
    python -m bench.engine --device cuda [--quick] [--json FILE]       on a GPU: see ``engine_gpu``

Ours is the bare engine (``bare_engine``), in bfloat16 and with the weights of 4 and 8 bits as the
GGUF file holds them; vLLM has the same weights in bf16 (``peers/bench_vllm.py``), llama.cpp the
same file (``peers/bench_llama_cpp.py``). Random prompts, greedy, no prefix cache, as many threads
as cores each. The peers' processes run between those of ours, one at a time, and all samples of a
shape are pooled: what a noisy machine does to one, it does to the other. A shape's time is that of
the whole of it, first to last token; llama.cpp's decoding is timed behind its prompt, and so is
ours beside it.

*The limit* of a prefill is the time of the model's matrices alone, by the fastest product there is
in this repository, on as many rows at once as a chunk has. A process takes both in turn, and of
both the least time: a limit is what would be possible, and so must be what it is compared with.
"""

import argparse
import json
import os
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bench.bare_engine import CHUNK_TOKENS, Work, bare_engine
from bench.frame import ROOT, Bar, Options, Row, at_least, at_most, row, run, skipped
from bench.peer_places import PEERS, peer_missing, peer_model, peer_python

ROUNDS = 3
LOAD_S_MAX = 6.0
OVERHEAD_MIB_MAX = 400.0
PEER_S_MAX = 1800.0
LIMIT_ROUNDS = 5
SCRIPTS = {"vllm": "bench/peers/bench_vllm.py", "llama": "bench/peers/bench_llama_cpp.py"}


@dataclass(frozen=True, slots=True)
class Shape:
    """As ``peers/bench_vllm.py`` has them."""

    requests: int
    prompt_tokens: int
    generated_tokens: int

    @property
    def name(self) -> str:
        if self.generated_tokens == 1:
            return f"prefill, {self.requests} × {self.prompt_tokens}"
        if self.prompt_tokens < CHUNK_TOKENS // 8:
            return f"decode, {self.requests} × {self.generated_tokens}"
        return f"{self.requests} × ({self.prompt_tokens} in, {self.generated_tokens} out)"

    @property
    def tokens(self) -> int:
        """That its rate counts."""
        counted = self.prompt_tokens if self.generated_tokens == 1 else self.generated_tokens
        return self.requests * counted


PREFILL, LONG_PREFILL = Shape(1, 512, 1), Shape(1, 2048, 1)
ONE, EIGHT, MANY = Shape(1, 32, 129), Shape(8, 32, 129), Shape(32, 32, 129)
MIXED = Shape(16, 512, 128)
SHAPES = (PREFILL, Shape(4, 512, 1), LONG_PREFILL, ONE, EIGHT, MANY, MIXED)

FORMS = {"bf16": "none", "4-bit file": "file"}

VLLM_BARS = {
    (PREFILL, "bf16"): at_least(1.05, of="ratio"),
    (LONG_PREFILL, "bf16"): at_least(1.15, of="ratio"),
    (ONE, "4-bit file"): at_least(2.3, of="ratio"),
    (EIGHT, "bf16"): at_least(1.4, of="ratio"),
    (MANY, "bf16"): at_least(1.3, of="ratio"),
    (MIXED, "bf16"): at_least(1.25, of="ratio"),
}
LIMIT_BAR = at_least(0.75, of="ratio")
LLAMA_BAR = at_least(1.0, of="ratio")


@dataclass(slots=True)
class Samples:
    """Tokens per second, by shape; and what else a process tells."""

    rates: dict[Shape, list[float]] = field(default_factory=lambda: defaultdict(list))
    step_rates: list[float] = field(default_factory=list)  # one stream, without its prompt
    best_rates: list[float] = field(default_factory=list)  # of ``PREFILL``, the best of a process
    limit_rates: list[float] = field(default_factory=list)  # its matrices alone, likewise
    load_s: list[float] = field(default_factory=list)  # from starting a process to a first token
    overhead_mib: list[float] = field(default_factory=list)  # resident beside weights and cache


def measure(options: Options) -> Iterator[Row]:
    if options.arguments.device == "cuda":
        from bench import engine_gpu  # Triton is where GPUs are

        yield from engine_gpu.measure(options)
        return
    rounds = options.arguments.rounds or (1 if options.quick else ROUNDS)
    ours = {name: Samples() for name in FORMS}
    vllm, llama = Samples(), Samples()
    missing = {peer: peer_missing(peer) for peer in PEERS}
    if options.arguments.only == "ours":
        missing = dict.fromkeys(missing, "--only ours")
    for index in range(rounds):
        for name, quantization in FORMS.items():
            _measure_ours(ours[name], quantization, seed=100 * index)
        if not missing["vllm"]:
            _measure_vllm(vllm, seed=index, repeat=1 if options.quick else 2)
        for name, quantization in reversed(FORMS.items()):
            _measure_ours(ours[name], quantization, seed=100 * index + 50)
        if not missing["llama"]:
            _measure_llama(llama)
    yield from _beside_vllm(ours, vllm, missing["vllm"])
    yield from _beside_limit(ours["bf16"])
    yield from _beside_llama(ours, llama, missing["llama"])
    for name, samples in ours.items():
        yield row(f"start to first token, {name}", samples.load_s, "s", bar=at_most(LOAD_S_MAX))
        yield row(
            f"resident beside weights and cache, {name}", samples.overhead_mib, "MiB",
            bar=at_most(OVERHEAD_MIB_MAX),
        )  # fmt: skip


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────


def _beside_vllm(ours: dict[str, Samples], vllm: Samples, missing: str) -> Iterator[Row]:
    for shape in SHAPES:
        for name, samples in ours.items():
            yield row(
                f"{shape.name}, {name}", samples.rates[shape], "tokens/s",
                reference="" if missing else "vLLM, bf16", reference_samples=vllm.rates[shape],
                bar=None if missing else VLLM_BARS.get((shape, name)),
            )  # fmt: skip
    if missing:
        yield skipped("all of it beside vLLM", "", missing)


def _beside_limit(ours: Samples) -> Iterator[Row]:
    yield row(
        f"{PREFILL.name}, bf16, at best", ours.best_rates, "tokens/s",
        reference="its matrices alone", reference_samples=ours.limit_rates, bar=LIMIT_BAR,
    )  # fmt: skip


def _beside_llama(ours: dict[str, Samples], llama: Samples, missing: str) -> Iterator[Row]:
    for name, samples in ours.items():
        bar: Bar | None = LLAMA_BAR if name == "4-bit file" and not missing else None
        yield row(
            f"decode, one stream, without its prompt, {name}", samples.step_rates, "tokens/s",
            reference="" if missing else "llama.cpp, the same file",
            reference_samples=llama.step_rates, bar=bar,
        )  # fmt: skip
        for shape in (PREFILL, LONG_PREFILL):
            if llama.rates[shape]:
                yield row(
                    f"{shape.name}, {name}", samples.rates[shape], "tokens/s",
                    reference="llama.cpp, the same file", reference_samples=llama.rates[shape],
                )  # fmt: skip
    if missing:
        yield skipped("beside llama.cpp", "", missing)


# ── processes ────────────────────────────────────────────────────────────────────────────────────


def _measure_ours(samples: Samples, quantization: str, *, seed: int) -> None:
    with bare_engine(quantization=quantization) as engine:
        engine.do(Work(1, 16, 1, seed))
        samples.load_s.append(engine.age_s)
        samples.overhead_mib.append(engine.overhead_mib())
        engine.do(Work(2, 64, 8, seed))
        for index, shape in enumerate(SHAPES, start=1):
            done = engine.do(
                Work(shape.requests, shape.prompt_tokens, shape.generated_tokens, seed + index)
            )
            samples.rates[shape].append(shape.tokens / done.total_s)
            if shape == ONE:
                samples.step_rates.append(len(done.step_ms) / sum(done.step_ms) * 1000)

        prefill_s, limit_s = [], []
        for index in range(LIMIT_ROUNDS):
            prefill_s.append(engine.do(Work(1, PREFILL.tokens, 1, seed + index)).total_s)
            limit_s.append(engine.matrices_s(PREFILL.tokens))
        samples.best_rates.append(PREFILL.tokens / min(prefill_s))
        samples.limit_rates.append(PREFILL.tokens / min(limit_s))


def _measure_vllm(samples: Samples, *, seed: int, repeat: int) -> None:
    said = _said("vllm", f"--repeat={repeat}", f"--seed={seed}")
    for one in said:
        if "requests" in one:
            shape = Shape(one["requests"], one["prompt_tokens"], one["generated_tokens"])
            samples.rates[shape] += [shape.tokens / seconds for seconds in one["seconds"]]


def _measure_llama(samples: Samples) -> None:
    for one in _said("llama"):
        rates = [one["tokens"] / seconds for seconds in one["seconds"]]
        if one["name"] == "decode":
            samples.step_rates += rates
        else:
            samples.rates[Shape(1, one["tokens"], 1)] += rates


def _said(peer: str, *options: str) -> list[dict[str, Any]]:
    """What the peer's own benchmark prints."""
    command = [str(peer_python(peer)), SCRIPTS[peer], str(peer_model(peer))]
    threads = f"--threads={len(os.sched_getaffinity(0))}"
    done = subprocess.run(
        [*command, threads, *options],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=PEER_S_MAX,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS}, with --quick 1")
    parser.add_argument("--only", choices=("ours",))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


if __name__ == "__main__":
    run("engine", measure, add_arguments=add_arguments)
