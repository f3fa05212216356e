"""The Triton path behind the whole cluster, in Triton's interpreter, on the CPU."""

import os
from pathlib import Path

import pytest

from tests.integration.harness import running, settings
from tests.models.small import write_small_model


def test_the_triton_path_serves_and_its_kernels_ran(
    tmp_path: Path, default_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_small_model(tmp_path / "tiny", tokenizer_from=default_model)
    prompt = list(range(100, 140))
    answers = {}
    for kernels in ("cpu", "triton"):
        monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
        config = settings(
            model,
            model={"dtype": "float32", "kernels": kernels},
            prefill={"threads": 1, "pool_blocks": 32},
            decode={"threads": 1, "pool_blocks": 32},
            store={"arena_bytes": 16 << 20},
        )
        with running(config) as cluster:
            answers[kernels] = cluster.tokens(prompt, 6)
            for role in ("prefill", "decode"):
                for path in ("cpu", "triton"):
                    ran = cluster.counter(role, f"calls_{path}_attention")
                    assert (ran > 0) == (path == kernels), f"{role} ran {ran} on {path}"
    assert answers["triton"] == answers["cpu"]
