"""Warming up: what runs before the first request, and that nobody takes it for a request's work."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pdserve.cluster import worker_parts
from pdserve.cluster.worker_parts import WARMING_TOKENS, WorkerParts, build_parts, warm_up
from pdserve.config import ClusterConfig, StoreConfig
from pdserve.kvstore.keys import MUST_MATCH, namespace_of
from pdserve.messages import Role
from pdserve.model import source
from tests.unit.engine.fakes import BLOCK_TOKENS, FakeRunner, letters


@pytest.mark.parametrize(
    ("block_count", "chunk"),
    [(100, WARMING_TOKENS), (WARMING_TOKENS // BLOCK_TOKENS, WARMING_TOKENS - 1), (2, 7)],
)
def test_a_chunk_and_a_decode_step_run_as_far_as_the_pool_goes(
    block_count: int, chunk: int
) -> None:
    runner = FakeRunner(block_count)
    warm_up(runner)
    assert runner.steps == [[chunk], [1]]


def test_what_warming_ran_is_not_counted() -> None:
    calls = {"linear": 12, "attention": 4, "sampled": 1}
    runner = SimpleNamespace(ops=SimpleNamespace(name="cpu"), calls=lambda: calls)
    parts = WorkerParts(
        config=ClusterConfig(),
        role=Role.DECODE,
        runner=runner,  # type: ignore[arg-type]
        tokenizer=letters(),
        namespace=b"",
        warming_calls={"linear": 10, "attention": 4},
    )
    assert parts.kernel_calls() == {
        "calls_cpu_linear": 2,
        "calls_cpu_attention": 0,
        "calls_cpu_sampled": 1,
    }


def test_the_store_s_salt_is_in_the_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = dict.fromkeys(MUST_MATCH, "same")
    runner: Any = SimpleNamespace(architecture=None, calls=dict)
    monkeypatch.setattr(source, "locate", lambda model: SimpleNamespace(path=Path()))
    monkeypatch.setattr(worker_parts, "load_leader", lambda *_, **__: (runner, None))
    monkeypatch.setattr(worker_parts, "warm_up", lambda runner: None)
    monkeypatch.setattr(worker_parts, "load_tokenizer", lambda path: letters())
    monkeypatch.setattr(worker_parts, "kv_identity", lambda *_, **__: identity)
    for salt in ("", "a secret"):
        config = ClusterConfig(store=StoreConfig(key_salt=salt))
        assert build_parts(config, Role.DECODE).namespace == namespace_of(identity, salt=salt)
