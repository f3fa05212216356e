"""``pdserve profile`` for real, on a small model: a runner, a store node, a file that loads."""

from pathlib import Path

import pytest
import yaml

from pdserve.cluster.commands import contention, profiling
from pdserve.cluster.commands.profile import profile
from pdserve.cluster.profiles import read_profile, weights_of
from pdserve.config import ClusterConfig, ModelConfig, PoolConfig
from pdserve.errors import ConfigError
from tests.models.small import write_small_model

KV_TOKEN_BYTES = 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, channels, bf16


def test_a_profile_is_measured_written_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profiling, "RUNS_S", 0.0)
    monkeypatch.setattr(profiling, "CACHED_TOKENS", (0, 512))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    model = write_small_model(tmp_path / "model")
    pool = PoolConfig(threads=1, pool_blocks=1024)
    config = ClusterConfig(model=ModelConfig(source=str(model)), prefill=pool, decode=pool)
    path = profile(config, out=tmp_path / "small.yaml")
    read = read_profile(path)
    assert (read.costs.name, read.costs.origin) == ("model", "measured")
    assert read.costs.kv_token_bytes == KV_TOKEN_BYTES
    assert read.costs.prefill_ns(512) > 0
    assert read.costs.decode.step_ns(4, 400) > 0
    assert read.costs.host.bytes_per_s > 0
    assert read.size.kv_capacity_tokens == 1024 * 16
    assert read.size.double_cost_tokens is not None
    assert read.weights == weights_of(config.model)
    about = yaml.safe_load(path.read_text())["about"]
    assert {"date", "machine", "torch", "pdserve", "errors_percent"} <= set(about)
    assert about["errors_percent"]["host"]["points"] == 10
    said = capsys.readouterr().out
    assert "decode steps: " in said
    assert "written to" in said


@pytest.mark.slow
def test_what_neighbours_cost_is_measured_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profiling, "RUNS_S", 0.0)
    monkeypatch.setattr(profiling, "CACHED_TOKENS", (0,))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    model = write_small_model(tmp_path / "model")
    pool = PoolConfig(threads=1, pool_blocks=1024)
    config = ClusterConfig(model=ModelConfig(source=str(model)), prefill=pool, decode=pool)
    path = profile(config, out=tmp_path / "small.yaml", neighbours=1)
    assert read_profile(path).contention >= 1
    about = yaml.safe_load(path.read_text())["about"]
    assert about["neighbours"] == 1
    assert "beside 1 at work everything takes" in capsys.readouterr().out


@pytest.mark.slow
def test_a_neighbour_that_cannot_begin_is_said(tmp_path: Path) -> None:
    config = ClusterConfig(model=ModelConfig(source=str(tmp_path / "no model here")))
    with (
        pytest.raises(ConfigError, match="did not begin"),
        contention.busy_neighbours(config, 1),
    ):
        pass
