"""The promises of the package that can be counted; times are the benchmark's."""

from pathlib import Path

from bench.surface_package import (
    DEPENDENCIES_MAX,
    MB,
    WHEEL_MB_MAX,
    dependencies,
    packed_bytes,
)


def test_there_are_few_direct_dependencies_and_each_has_a_bound() -> None:
    names = dependencies()
    assert len(names) <= DEPENDENCIES_MAX
    assert [name for name in names if "<" not in name] == []


def test_the_wheel_is_small() -> None:
    assert packed_bytes() <= WHEEL_MB_MAX * MB


def test_what_is_too_large_is_seen(tmp_path: Path) -> None:
    (tmp_path / "pdserve").mkdir()
    (tmp_path / "pdserve" / "weights.bin").write_bytes(bytes(range(256)) * 100)
    assert packed_bytes(tmp_path) > 100
