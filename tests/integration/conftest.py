"""The run's Ray ends with the run; clusters that tests share are in tests/conftest.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.harness import end_ray
from tests.redis_server import RedisServer, running_redis


@pytest.fixture(scope="session", autouse=True)
def _ray_ends() -> Iterator[None]:
    yield
    end_ray()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server
