"""llama.cpp on one stream: prefill of 512 and 2048 tokens, decode of 128. A JSON row each.

bench_llama_cpp.py FILE.gguf [--threads N] [--repeat 3]
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable

from llama_cpp import Llama  # type: ignore[import-not-found]  # not our environment

CONTEXT_TOKENS = 4096
WARM_UP_TOKENS = 64
DECODE_PROMPT_TOKENS = 32


def seconds(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def prefill_s(model: Llama, tokens: list[int]) -> float:
    model.reset()
    return seconds(lambda: model.eval(tokens))


def decode_s(model: Llama, tokens: list[int]) -> float:
    """One token after the other, behind a short prompt."""

    def one_by_one() -> None:
        for token in tokens:
            model.eval([token])

    model.reset()
    model.eval([5] * DECODE_PROMPT_TOKENS)
    return seconds(one_by_one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    model = Llama(
        model_path=arguments.model,
        n_ctx=CONTEXT_TOKENS,
        n_threads=arguments.threads,
        n_threads_batch=arguments.threads,
        n_batch=512,
        verbose=False,
    )
    chance = random.Random(0)

    def prompt(count: int) -> list[int]:
        return [chance.randrange(100, 49_000) for _ in range(count)]

    prefill_s(model, prompt(WARM_UP_TOKENS))
    for name, measure, count in (
        ("prefill", prefill_s, 512),
        ("prefill", prefill_s, 2048),
        ("decode", decode_s, 128),
    ):
        samples = sorted(measure(model, prompt(count)) for _ in range(arguments.repeat))
        rate = count / statistics.median(samples)
        row = {"name": name, "tokens": count, "seconds": samples, "tokens_per_s": rate}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
