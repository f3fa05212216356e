"""Ray that is too slow is started again; other troubles, and too many, are told."""

from pathlib import Path
from typing import Any

import pytest

from pdserve.cluster.own_ray import STARTS_MAX, start_ray
from pdserve.errors import ConfigError

STORE_BYTES = 1 << 20

SLOW = "The current node timed out during startup. This could happen because …"


class Slow:
    """``ray.init`` that fails a number of times."""

    def __init__(self, times: int, message: str = SLOW) -> None:
        self.directories: list[str] = []
        self._times, self._message = times, message

    def __call__(self, *, _temp_dir: str, **_: Any) -> None:
        self.directories.append(_temp_dir)
        if len(self.directories) <= self._times:
            raise RuntimeError(self._message)


@pytest.mark.parametrize("times", range(STARTS_MAX))
def test_it_is_started_again_each_time_in_a_directory_of_its_own(
    times: int, tmp_path: Path
) -> None:
    init, said = Slow(times), list[str]()
    start_ray(tmp_path, STORE_BYTES, progress=said.append, init=init)
    assert len(init.directories) == len(set(init.directories)) == times + 1
    assert len(said) == times


def test_too_many_times_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    init = Slow(STARTS_MAX)
    with pytest.raises(ConfigError, match="what else runs here"):
        start_ray(tmp_path, STORE_BYTES, progress=lambda _: None, init=init)
    assert len(init.directories) == STARTS_MAX


def test_another_trouble_is_not_tried_again(tmp_path: Path) -> None:
    init = Slow(1, "no such directory")
    with pytest.raises(Exception, match="no such directory"):
        start_ray(tmp_path, STORE_BYTES, progress=lambda _: None, init=init)
    assert len(init.directories) == 1
