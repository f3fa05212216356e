"""Models and running clusters that tests of several folders share: one start, many questions.

What needs Ray or torch is imported by the fixtures that use it: unit tests collect without.
"""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.integration.harness import TestCluster

# What is tested is the sources, which fakes may subclass; ``test_compiled`` tests what is built.
os.environ.setdefault("PDSERVE_COMPILED", "0")

# A deadline is a bound on time, and here other tests take the processor at any moment.
hypothesis.settings.register_profile("shared processor", deadline=None)
hypothesis.settings.register_profile("campaign", deadline=None, max_examples=20_000)
hypothesis.settings.load_profile("shared processor")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The GGUF file of SmolLM2."""
    from pdserve.config import ModelConfig
    from pdserve.errors import ConfigError
    from pdserve.model.source import locate

    try:
        return locate(ModelConfig()).path
    except ConfigError as error:
        pytest.skip(f"the default model is not here: {error}")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Path:
    """Two seeded layers under a peaked head, with the real tokeniser."""
    from tests.models.small import write_small_model

    return write_small_model(tmp_path_factory.mktemp("model"), tokenizer_from=default_model)


@pytest.fixture(scope="session")
def small_adapters(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two of them for the small model, each large enough to change what it says."""
    from tests.models.adapter import shapes_of, write_adapter

    directory, shapes = tmp_path_factory.mktemp("adapters"), shapes_of(small_model)
    return {
        name: write_adapter(directory / name, shapes, rank=rank, seed=rank)
        for name, rank in (("terse", 4), ("verbose", 8))
    }


@pytest.fixture(scope="session")
def reference(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SmolLM2 as ``transformers`` computes it, in float32."""
    from tests.models.reference import reference_model

    return reference_model(default_model, scratch=tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def cluster_port() -> int:
    from tests.integration.harness import free_port

    return free_port()


@pytest.fixture
def cluster(small_model: Path, small_adapters: dict[str, Path], cluster_port: int) -> "TestCluster":
    """One prefill worker, two decode workers, two routers of which one leads; the small model in
    float32 and two adapters. Shared: look at counters before and after, and leave it as quiet as
    you found it.

    Its HTTP port is fixed: a new gateway must be found where the old one was.
    """
    from tests.integration.harness import settings, shared

    return shared(
        settings(
            small_model,
            model={
                "dtype": "float32",
                "served_name": "small",
                "adapters": {name: str(path) for name, path in small_adapters.items()},
            },
            decode={"replicas": 2, "replicas_max": 2, "threads": 1, "pool_blocks": 512},
            prefill={"chunk_tokens": 256, "threads": 1, "pool_blocks": 512},
            # Quanta for so small a model, and a first guess of its speed that is far too good.
            router={"replicas": 2, "first_quantum_ms": 1.0, "prefill_tokens_per_s": 5_000_000},
            gateway={"http_port": cluster_port},
        )
    )


@pytest.fixture
def real_cluster(default_model: Path) -> "TestCluster":
    """One worker each, SmolLM2 in float32. Shared as ``cluster`` is."""
    from tests.integration.harness import settings, shared

    return shared(
        settings(
            default_model,
            model={"dtype": "float32"},
            prefill={"threads": 2, "pool_blocks": 400, "chunk_tokens": 128},
            decode={"threads": 2, "pool_blocks": 600},
            store={"arena_bytes": 512 << 20},
            router={"prefill_tokens_per_s": 1000},
        )
    )


@pytest.fixture
def careless_cluster(small_model: Path) -> "TestCluster":
    """One worker each, and a second decode worker when Serve wants one. Nobody verifies checksums,
    and the first few blocks that leave prefill have a flipped bit; later ones are whole. Shared, so
    whoever is after those blocks comes first."""
    from pdserve.cluster.worker_parts import FLIP_ENV
    from tests.integration.harness import settings, shared

    return shared(
        settings(
            small_model,
            model={"dtype": "float32"},
            decode={
                "replicas": 1,
                "replicas_max": 2,
                "threads": 1,
                "pool_blocks": 512,
                "running_max": 8,
            },
            store={"verify": False},
            autoscaling={
                "upscale_delay_s": 0.5,
                "downscale_delay_s": 2.0,
                "metrics_interval_s": 0.5,
            },
        ),
        environment={FLIP_ENV: "2,3,5"},
    )


def pytest_configure(config: pytest.Config) -> None:
    """A filter's class is imported, so it cannot stand in pyproject.toml: where kernels are tested
    on a GPU there is no pydantic."""
    if importlib.util.find_spec("pydantic") is not None:
        ignored = "ignore:.*:pydantic.warnings.PydanticDeprecatedSince20"
        config.addinivalue_line("filterwarnings", ignored)


SLOW_S_MAX = 1800
"""Of a slow test that does not say how long it may take, on a machine that is slow as well."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those who share a cluster stand together, at the end, so that it starts once; those who
    shoot at it come last."""
    items.sort(key=_place)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_S_MAX))


def _place(item: pytest.Item) -> tuple[int, bool]:
    shared_ones = ("careless_cluster", "real_cluster", "cluster")
    fixtures = getattr(item, "fixturenames", ())
    place = next((place for place, name in enumerate(shared_ones) if name in fixtures), -1)
    return place, place >= 0 and item.nodeid.startswith("tests/faults/")
