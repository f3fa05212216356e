"""Profiles as files: round trips, names, and what a wrong one is told."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdserve.cluster.commands.simulate import settings_of
from pdserve.cluster.profiles import (
    FACTORS,
    SHIPPED_DIRECTORY,
    Profile,
    Size,
    doubt,
    load_profile,
    read_profile,
    save_profile,
    shipped_names,
    weights_of,
    write_shipped,
)
from pdserve.config import ClusterConfig, ModelConfig
from pdserve.errors import ConfigError
from pdserve.router.analytic import SHIPPED, analytic_costs
from pdserve.router.costs import believed


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    save_profile(believed(1500), path, about={"machine": "a laptop"})
    assert load_profile(path) == believed(1500)
    assert yaml.safe_load(path.read_text())["about"] == {"machine": "a laptop"}


def test_the_size_of_a_worker_is_read_where_it_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    save_profile(believed(1500), path, about={"kv_capacity_tokens": 4096, "machine": "a laptop"})
    assert read_profile(path).size == Size(kv_capacity_tokens=4096)
    save_profile(believed(1500), path)
    assert read_profile(path).size == Size()
    for deployment in SHIPPED:
        capacity_tokens = read_profile(deployment.name).size.kv_capacity_tokens
        assert capacity_tokens == deployment.kv_capacity_tokens


def test_the_shipped_files_are_what_the_formula_gives_today(tmp_path: Path) -> None:
    write_shipped(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    shipped = {path.name: path.read_text() for path in SHIPPED_DIRECTORY.glob("*.yaml")}
    assert shipped == made, "run python -m pdserve.cluster.profiles"


def test_a_shipped_profile_is_found_by_its_name() -> None:
    assert "h100-llama3-8b" in shipped_names()
    for deployment in SHIPPED:
        assert load_profile(deployment.name) == analytic_costs(deployment)
        assert load_profile(f"{deployment.name}.yaml") == analytic_costs(deployment)


def test_a_file_here_comes_before_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_profile(believed(7), "h100-llama3-8b")
    assert load_profile("h100-llama3-8b") == believed(7)


def test_a_number_without_a_point_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-7 as text."""
    path = changed(tmp_path, ("prefill", "pair_s"), "1e-7")
    assert load_profile(path).prefill.pair_s == 1e-7


@pytest.mark.parametrize("name", ["h100-llama3-8", "h100-lama3-8b"])
def test_an_unknown_name_names_the_nearest(name: str) -> None:
    with pytest.raises(ConfigError, match="neither a file nor a shipped one; did you mean 'h"):
        load_profile(name)


def test_a_name_like_no_other_lists_them_all() -> None:
    with pytest.raises(ConfigError, match="shipped ones: a100-llama2-70b-tp8, "):
        load_profile("zzz")


def test_a_path_that_is_not_there_is_said_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the profile .*x.yaml: No such file"):
        load_profile(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match=r"cannot read the profile .*: Is a directory"):
        load_profile(tmp_path)


def test_a_path_that_cannot_be_written_is_said_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write the profile .*: No such file"):
        save_profile(believed(1), tmp_path / "no" / "x.yaml")


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        (("prefill", "token_s"), -1, "prefill.token_s is -1, must be a number, not below 0"),
        (("prefill", "token_s"), True, "prefill.token_s is True, must be a number"),
        (("prefill", "token_s"), "fast", "prefill.token_s is 'fast', must be a number"),
        (("decode", "small", "fixed_s"), float("inf"), "decode.small.fixed_s is inf"),
        (("decode", "large_from"), 1.5, "decode.large_from is 1.5, must be a whole number above 0"),
        (("host", "bytes_per_s"), 0, "host.bytes_per_s is 0, must be a number above 0"),
        (("origin",), "guessed", "origin is 'guessed', must be one of measured, analytic"),
        (("name",), 7, "name is 7, must be text"),
        (("kv_token_bytes",), None, "kv_token_bytes is None, must be a whole number"),
        (("prefill", "token_seconds"), 1, "unknown key 'prefill.token_seconds'; did you mean 'tok"),
        (("bandwidth",), 1, "unknown key 'bandwidth'; known: name, origin"),
        (("prefill",), 3, "prefill must hold a mapping, not 3"),
        (("about",), "me", "about must hold a mapping, not 'me'"),
        (("about",), {"chunk_tokens": 0}, "about.chunk_tokens is 0, must be a whole number above"),
    ],
)
def test_a_value_that_does_not_fit_is_named(
    tmp_path: Path, place: tuple[str, ...], value: object, complaint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_profile(changed(tmp_path, place, value))
    assert complaint in str(caught.value)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: x\norigin: measured\nprefill: {fixed_s: 1}\n")
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    for missing in ("prefill.token_s", "prefill.pair_s", "decode", "kv_token_bytes"):
        assert f"{missing} is missing" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"), [("[1", "is not YAML"), ("", "must hold a mapping"), ("3", "mapping")]
)
def test_what_is_no_profile_at_all_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        load_profile(path)


def changed(directory: Path, place: tuple[str, ...], value: object) -> Path:
    """A file of a good profile with one value changed."""
    tree: dict[str, Any] = dataclasses.asdict(believed(1500))
    part = tree
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    path = directory / "changed.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


EACH_FACTOR = pytest.mark.parametrize("factor", FACTORS)


@EACH_FACTOR
def test_a_factor_is_read_where_it_was_measured(tmp_path: Path, factor: str) -> None:
    path = tmp_path / "x.yaml"
    save_profile(believed(1500), path, about={factor: 1.4})
    profile = read_profile(path)
    assert getattr(profile, factor) == 1.4
    assert sorted(getattr(profile, each) for each in FACTORS) == [1.0, 1.0, 1.4]
    save_profile(believed(1500), path)
    assert getattr(read_profile(path), factor) == 1


@EACH_FACTOR
@pytest.mark.parametrize("said", [0.9, -1, "much", True, float("inf")])
def test_a_factor_that_is_none_is_named(tmp_path: Path, said: object, factor: str) -> None:
    path = tmp_path / "x.yaml"
    save_profile(believed(1500), path, about={factor: said})
    with pytest.raises(ConfigError, match=rf"about.{factor} is .*, must be a number, at least 1"):
        read_profile(path)


def test_what_is_slower_in_a_cluster_is_simulated_and_not_predicted() -> None:
    costs = believed(1500)
    profile = Profile(costs, Size(), contention=1.3, prefill_slowdown=1.2, decode_slowdown=1.5)
    settings = settings_of(ClusterConfig(), profile)
    assert settings.predicted == costs
    assert settings.contention == 1.3
    prefill_ns, step_ns = settings.costs.prefill_ns(900, 64), settings.costs.decode.step_ns(4, 900)
    assert prefill_ns == pytest.approx(1.2 * costs.prefill_ns(900, 64), abs=1)
    assert step_ns == pytest.approx(1.5 * costs.decode.step_ns(4, 900), abs=1)
    assert settings.costs.host == costs.host


def test_workers_with_other_weights_than_were_measured_are_doubted(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    four_bits, bfloat16 = ModelConfig(), ModelConfig(dtype="bfloat16", quantization="none")
    save_profile(believed(1500), path, about={"weights": weights_of(four_bits)})
    profile = read_profile(path)
    assert doubt(profile, four_bits) is None
    said = doubt(profile, bfloat16)
    assert said is not None
    assert "dtype auto, quantization auto, the workers have dtype bfloat16, quantization n" in said
    save_profile(believed(1500), path)  # does not say
    assert doubt(read_profile(path), bfloat16) is None


def test_weights_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    save_profile(believed(1500), path, about={"weights": 4})
    with pytest.raises(ConfigError, match=r"about.weights is 4, must be text"):
        read_profile(path)
