"""Settings: sources and their order, and what is said about those that do not fit."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pdserve.config import (
    AutoscalingConfig,
    ClusterConfig,
    GatewayConfig,
    ModelConfig,
    PoolConfig,
    StoreConfig,
)
from pdserve.errors import ConfigError
from pdserve.router_config import RouterConfig
from pdserve.settings import from_tree, load, to_tree


def load_text(tmp_path: Path, text: str) -> ClusterConfig:
    file = tmp_path / "pdserve.yaml"
    file.write_text(text)
    return load(file, environment={})


def test_nothing_set_is_the_defaults() -> None:
    assert load(environment={}) == ClusterConfig()


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "pdserve.yaml"
    file.write_text("prefill: {replicas: 2, replicas_max: 9, chunk_tokens: 64}\n")
    config = load(
        file,
        environment={"PDSERVE_PREFILL__REPLICAS": "3", "PDSERVE_DECODE__NICE": "1"},
        assignments=["prefill.replicas=4", "model.source=/models/llama"],
    )
    assert config.prefill.chunk_tokens == 64
    assert config.prefill.replicas == 4
    assert config.decode.nice == 1
    assert config.model.source == "/models/llama"
    assert config.prefill.nice == ClusterConfig().prefill.nice  # what nobody set stays


def test_the_environment_counts_where_no_assignment_speaks() -> None:
    config = load(environment={"PDSERVE_ROUTER__POLICY": "fcfs", "PDSERVE_HOST_ID": "a"})
    assert config.router.policy == "fcfs"


def test_variables_that_name_no_part_are_not_ours() -> None:
    assert load(environment={"PDSERVE_HOST_ID": "a", "PATH": "/bin"}) == ClusterConfig()


@pytest.mark.parametrize(
    ("prefill", "decode", "mode", "parts"),
    [(1, 1, "auto", 1), (2, 1, "auto", 2), (4, 6, "disaggregated", 12), (3, 2, "aggregated", 2)],
)
def test_all_workers_cut_the_model_alike(prefill: int, decode: int, mode: str, parts: int) -> None:
    pools = {"prefill": {"tensor_parallel": prefill}, "decode": {"tensor_parallel": decode}}
    assert from_tree({**pools, "router": {"mode": mode}}).tensor_parts == parts


def test_a_worker_of_several_processes_has_no_core_to_itself() -> None:
    tree = {"router": {"mode": "aggregated"}}
    assert from_tree(tree).has_one_worker
    assert not from_tree({**tree, "models": {"b": {}}}).has_one_worker
    assert not from_tree({**tree, "decode": {"tensor_parallel": 2}}).has_one_worker


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"prefil": {}}, "unknown key 'prefil'; did you mean 'prefill'?"),
        (
            {"prefill": {"chunk_token": 1}},
            "unknown key 'prefill.chunk_token'; did you mean 'chunk_tokens'?",
        ),
        ({"qqqq": 1}, "unknown key 'qqqq'; known: model, models, prefill"),
        ({"prefill": 3}, "prefill must be a mapping, not 3"),
        ({"store": {"tenant_shares": {"a": 0}}}, "tenant_shares.a is 0.0, must be positive"),
        ({"store": {"hard_pin_ratio": 1}}, "hard_pin_ratio is 1.0, must be in [0, 0.9]"),
        ({"prefill": {"replicas": "two"}}, "prefill.replicas is 'two', must be a whole number"),
        ({"prefill": {"replicas": True}}, "prefill.replicas is True, must be a whole number"),
        ({"prefill": {"replicas": 1.0}}, "prefill.replicas is 1.0, must be a whole number"),
        ({"store": {"verify": 1}}, "store.verify is 1, must be true or false"),
        ({"router": {"gamma_per_s": "x"}}, "router.gamma_per_s is 'x', must be a number"),
        ({"model": {"source": 3}}, "model.source is 3, must be text"),
        ({"model": {"dtype": "int8"}}, "model.dtype is 'int8', must be one of auto, float32"),
        ({"model": {"quantization": "int3"}}, "model.quantization is 'int3', must be one of auto"),
        ({"model": {"kv_dtype": "fp16"}}, "model.kv_dtype is 'fp16', must be one of auto, int8"),
        (
            {"model": {"quantization": "file", "dtype": "float32"}},
            "quantization is file and dtype float32; quantised weights are computed with in bfl",
        ),
        ({"model": {"adapters": {"a": 3}}}, "model.adapters is {'a': 3}, must be text"),
        ({"model": {"adapters": {"": "/a"}}}, "adapters has one without a name"),
        (
            {"model": {"adapters": {"a": "/a"}}, "decode": {"tensor_parallel": 2}},
            "model.adapters: a model over several processes takes none so far",
        ),
        (
            {"model": {"kv_dtype": "int8"}, "prefill": {"tensor_parallel": 2}},
            "model.kv_dtype is int8: a model over several processes keeps KV as it is so far",
        ),
        (
            {"model": {"kv_dtype": "int8"}, "store": {"codec": "int8"}},
            "store.codec is int8: with model.kv_dtype int8 blocks have 8 bits already",
        ),
        (
            {"decode": {"tensor_parallel": 2, "step_ahead": True}},
            "decode.step_ahead: a model over several processes has to know each token",
        ),
        (
            {"model": {"adapters": {str(i): "/a" for i in range(65)}}},
            "adapters has 65 entries, at most 64 are loaded",
        ),
        ({"decode": {"resources": [1]}}, "decode.resources is [1], must be a mapping"),
        ({"decode": {"resources": {"a": "b"}}}, "decode.resources is {'a': 'b'}, must be a number"),
        (
            {"prefill": {"replicas": -1}},
            "prefill: PoolConfig: replicas is -1, must not be negative",
        ),
        (
            {"prefill": {"replicas": 3, "replicas_max": 1}},
            "replicas_max is 1, must be at least replicas and 1",
        ),
        ({"decode": {"tensor_parallel": 0}}, "decode: PoolConfig: tensor_parallel is 0, must be"),
        ({"prefill": {"pool_blocks": 1}}, "pool_blocks is 1, must be at least 2"),
        ({"gateway": {"http_port": 70000}}, "http_port is 70000, must be a port, 0 or -1"),
        ({"router": {"level_count": 17}}, "level_count is 17, must be at most 16"),
        ({"model": {"context_tokens": 1}}, "context_tokens is 1, must be at least 2"),
        ({"autoscaling": {"kv_pressure_ratio": 2}}, "kv_pressure_ratio is 2.0, must be in (0, 1]"),
        ({"router": {"gamma_per_s": float("nan")}}, "gamma_per_s is nan, must be positive"),
        ({"drain_timeout_s": 0}, "drain_timeout_s is 0.0, must be positive"),
        (
            {"store": {"tls_authority": "a.pem", "tls_key": "k.pem"}},
            "tls_certificate: TLS needs tls_authority, tls_certificate, tls_key; give all three",
        ),
        (
            {"store": {"mooncake": True, "key_file": "k"}},
            "mooncake: it goes with neither TLS nor key_file",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_value_and_rule(
    tree: Mapping[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_tree(tree)
    assert problem in str(caught.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        from_tree(
            {
                "prefil": {},
                "decode": {"replicas": -1, "threads": -1},
                "store": {"verify": "yes please"},
                "router": {"level_count": 0},
            }
        )
    for part in ("'prefil'", "replicas is -1", "threads is -1", "store.verify", "level_count is 0"):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [1, 1.0])
def test_a_whole_number_is_a_number(value: float) -> None:
    assert type(from_tree({"drain_timeout_s": value}).drain_timeout_s) is float


@pytest.mark.parametrize("value", [None, 7])
def test_what_may_be_left_open_may_be_none(value: int | None) -> None:
    assert from_tree({"decode": {"pool_blocks": value}}).decode.pool_blocks == value


def test_what_may_not_be_left_open_may_not_be_none() -> None:
    with pytest.raises(ConfigError, match=r"decode\.replicas is None, must be a whole number"):
        from_tree({"decode": {"replicas": None}})


@pytest.mark.parametrize(
    ("assignment", "problem"),
    [
        ("prefill.replicas", "'prefill.replicas' is not of the form part.field=value"),
        ("prefill.replicas.x=1", "replicas"),
        ("drain_timeout_s.x=1", "drain_timeout_s is {'x': 1}, must be a number"),
        ("=1", "unknown key"),
    ],
)
def test_an_assignment_that_says_nothing_is_refused(assignment: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environment={}, assignments=[assignment])
    assert problem in str(caught.value)


def test_an_assignment_into_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="is a value, it has no fields"):
        load(environment={}, assignments=["prefill=3", "prefill.replicas=1"])


def test_values_that_are_no_yaml_name_their_source() -> None:
    with pytest.raises(ConfigError, match=r"prefill\.resources=\{a"):
        load(environment={}, assignments=["prefill.resources={a: ["])
    with pytest.raises(ConfigError, match="PDSERVE_PREFILL__RESOURCES"):
        load(environment={"PDSERVE_PREFILL__RESOURCES": "{a: ["})


@pytest.mark.parametrize(
    ("text", "problem"),
    [("[1, 2]", "must hold a mapping, not list"), ("{a: [", "is not YAML"), ("3", "not int")],
)
def test_a_file_that_is_no_tree_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_text(tmp_path, text)


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert load_text(tmp_path, "# nothing\n") == ClusterConfig()


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.yaml: No such file"):
        load(tmp_path / "absent.yaml", environment={})


CONFIGS = st.builds(
    ClusterConfig,
    model=st.builds(ModelConfig, dtype=st.sampled_from(["auto", "float32"])),
    prefill=st.builds(
        PoolConfig,
        replicas=st.integers(0, 4),
        replicas_max=st.integers(4, 9),
        resources=st.dictionaries(st.sampled_from("ab"), st.floats(0, 1)),
        gpus=st.none() | st.just(0.5),
    ),
    router=st.builds(RouterConfig, gamma_per_s=st.floats(0.01, 5)),
)


@given(CONFIGS)
def test_a_tree_comes_back_as_it_was_through_yaml_too(config: ClusterConfig) -> None:
    assert from_tree(to_tree(config)) == config
    assert from_tree(yaml.safe_load(yaml.safe_dump(to_tree(config)))) == config


@pytest.mark.parametrize(
    "cls",
    [
        ModelConfig, PoolConfig, StoreConfig, RouterConfig, GatewayConfig, AutoscalingConfig,
        ClusterConfig,
    ],
)  # fmt: skip
def test_settings_are_frozen(cls: type) -> None:
    config = cls()
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, None)
