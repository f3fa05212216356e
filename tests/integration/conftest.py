"""Clusters that many tests share: one start, many questions."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.config import ModelConfig
from pdserve.errors import ConfigError
from tests.integration.harness import TestCluster, end_shared, settings, shared
from tests.models.small import write_small_model


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The GGUF file of SmolLM2."""
    from pdserve.model.source import locate

    try:
        return locate(ModelConfig()).path
    except ConfigError as error:
        pytest.skip(f"the default model is not here: {error}")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Path:
    """Two seeded layers under a peaked head, with the real tokeniser."""
    return write_small_model(tmp_path_factory.mktemp("model"), tokenizer_from=default_model)


@pytest.fixture
def cluster(small_model: Path) -> TestCluster:
    """One prefill worker, two decode workers, the small model in float32. Shared: look at counters
    before and after, and leave it as quiet as you found it."""
    return shared(
        settings(
            small_model,
            model={"dtype": "float32", "served_name": "small"},
            decode={"replicas": 2, "replicas_max": 2, "threads": 1, "pool_blocks": 512},
            prefill={"chunk_tokens": 256, "threads": 1, "pool_blocks": 512},
            # Quanta for so small a model, and a first guess of its speed that is far too good.
            router={"first_quantum_ms": 1.0, "prefill_tokens_per_s": 5_000_000},
        )
    )


@pytest.fixture(scope="session", autouse=True)
def _shared_cluster_ends() -> Iterator[None]:
    yield
    end_shared()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those who share the cluster stand together, at the end, so that it starts once."""
    items.sort(key=lambda item: "cluster" in getattr(item, "fixturenames", ()))
