"""vLLM without a server: its throughput for several shapes of batch. A JSON row each.

bench_vllm.py MODEL_DIR [--threads N] [--repeat 3] [--seed 0]

Random prompts, greedy, no prefix cache, and no end before the last token: the same work every time.
"""

import argparse
import json
import os
import random
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

KV_CACHE_GIB = 4


@dataclass(frozen=True)
class Shape:
    requests: int
    prompt_tokens: int
    generated_tokens: int


SHAPES = (
    Shape(1, 512, 1),
    Shape(4, 512, 1),
    Shape(1, 2048, 1),
    Shape(1, 32, 129),
    Shape(8, 32, 129),
    Shape(32, 32, 129),
    Shape(16, 512, 128),
)
WARM_UP = Shape(2, 64, 8)


def measure_s(engine: Any, sampling: Any, shape: Shape, chance: random.Random) -> float:
    prompts = [
        {"prompt_token_ids": [chance.randrange(100, 49_000) for _ in range(shape.prompt_tokens)]}
        for _ in range(shape.requests)
    ]
    settings = sampling(temperature=0, max_tokens=shape.generated_tokens, ignore_eos=True)
    begun = time.perf_counter()
    engine.generate(prompts, settings, use_tqdm=False)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # vLLM reads these when it is imported.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(KV_CACHE_GIB))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{arguments.threads - 1}")
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]  # not our environment

    begun = time.perf_counter()
    engine = LLM(
        model=arguments.model,
        dtype="bfloat16",
        max_model_len=4096,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    print(json.dumps({"name": "startup_s", "value": time.perf_counter() - begun}), flush=True)
    chance = random.Random(arguments.seed)
    measure_s(engine, SamplingParams, WARM_UP, chance)
    for shape in SHAPES:
        samples = sorted(
            measure_s(engine, SamplingParams, shape, chance) for _ in range(arguments.repeat)
        )
        median_s = statistics.median(samples)
        row = {
            **asdict(shape),
            "seconds": samples,
            "prompt_tokens_per_s": shape.requests * shape.prompt_tokens / median_s,
            "generated_tokens_per_s": shape.requests * shape.generated_tokens / median_s,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
