"""The run's Ray ends with the run; clusters that tests share are in tests/conftest.py."""

from collections.abc import Iterator

import pytest

from tests.integration.harness import end_ray


@pytest.fixture(scope="session", autouse=True)
def _ray_ends() -> Iterator[None]:
    yield
    end_ray()
