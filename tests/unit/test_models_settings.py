"""Several models in one tree of settings: what each gets, what is refused, and what is said."""

import string
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.errors import ConfigError
from pdserve.settings import (
    FURTHER_MAX,
    changes,
    deployment_suffix,
    first_model,
    from_tree,
    further_models,
    load,
    to_tree,
)
from pdserve.settings_schema import settings_schema

FIRST: dict[str, Any] = {
    "model": {
        "source": "/m/a",
        "revision": "r1",
        "dtype": "float32",
        "stored_as": "gguf",
        "served_name": "a",
        "adapters": {"a-terse": "/l/terse"},
    },
    "decode": {"replicas": 3, "threads": 2},
    "router": {"goal": "tail", "profile": "h100-llama3-8b"},
    "store": {"arena_bytes": 1 << 20},
}


def of(models: Any) -> Any:
    return from_tree({**FIRST, "models": models})


def test_a_further_model_is_as_the_first_but_for_what_it_says_and_what_its_files_are() -> None:
    config = of({"b": {"model": {"source": "/m/b"}, "decode": {"replicas": 1}}})
    b = further_models(config)["b"]
    assert (b.model.source, b.model.served_name, b.model.dtype) == ("/m/b", "b", "float32")
    assert (b.model.revision, b.model.stored_as, b.model.adapters) == (None, "any", {})
    assert (b.decode.replicas, b.decode.threads) == (1, 2)
    assert (b.router.goal, b.router.profile) == ("tail", None)
    assert b.store == config.store
    assert b.models == {}


def test_the_same_files_under_another_name_keep_what_belongs_to_them() -> None:
    b = further_models(of({"b": {"model": {"quantization": "none", "dtype": "bfloat16"}}}))["b"]
    assert (b.model.source, b.model.revision, b.model.stored_as) == ("/m/a", "r1", "gguf")
    assert b.router.profile == "h100-llama3-8b"
    assert b.model.adapters == {}  # their names are the first model's


def test_the_first_is_what_it_is_alone_so_that_another_model_changes_nothing_of_it() -> None:
    alone = from_tree(FIRST)
    assert first_model(of({"b": {}})) == alone
    assert further_models(alone) == {}


@pytest.mark.parametrize(
    ("models", "problem"),
    [
        ({"b": {"decod": {}}}, "unknown key 'models.b.decod'; did you mean 'decode'?"),
        ({"b": {"decode": {"replica": 2}}}, "unknown key 'models.b.decode.replica'"),
        ({"b": {"decode": {"replicas": "two"}}}, "models.b.decode.replicas is 'two'"),
        ({"b": {"decode": {"replicas": -1}}}, "models.b.decode: PoolConfig: replicas is -1"),
        ({"b": {"store": {}}}, "models.b.store: it is the whole cluster's"),
        ({"b": {"models": {}}}, "models.b.models: it is the whole cluster's"),
        ({"b": {"gateway": {"http_port": 1}}}, "models.b.gateway.http_port: no model has that"),
        ({"b": {"model": {"served_name": "c"}}}, "models.b.model.served_name"),
        ({"b": {"model": 3}}, "models.b.model must be a mapping"),
        ({"b": 3}, "models is {'b': 3}, must be a mapping"),
        ({"a": {}}, "models.a: 'a' is a name in model.served_name already"),
        ({"a-terse": {}}, "'a-terse' is a name in model.adapters already"),
        (
            {"b": {"model": {"adapters": {"x": "/x"}}}, "c": {"model": {"adapters": {"x": "/x"}}}},
            "models.c.model.adapters: 'x' is a name in models.b.model.adapters already",
        ),
        ({"b.1": {}, "B-1": {}}, "models.B-1: too much like models.b.1"),
        ({"模型": {}}, "a name has a Latin letter or digit"),
        ({"x" * 257: {}}, "at most 256 characters"),
        ({f"m{i}": {} for i in range(FURTHER_MAX + 1)}, f"at most {FURTHER_MAX} are served"),
    ],
)
def test_what_does_not_fit_is_said_by_name(models: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        of(models)
    assert problem in str(refused.value)


def test_all_models_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        of({"b": {"decod": {}}, "c": {"prefill": {"nic": 1}}})
    assert "models.b.decod" in str(refused.value)
    assert "models.c.prefill.nic" in str(refused.value)


def test_models_come_from_the_command_line_too(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("models: {b: {decode: {replicas: 2}}}\n")
    config = load(file, environment={}, also=["b=/m/b.gguf", "qwen/2.5=org/name:file.gguf"])
    further = further_models(config)
    assert [further[name].model.source for name in further] == ["/m/b.gguf", "org/name:file.gguf"]
    assert further["b"].decode.replicas == 2
    for wrong in ("b", "=x", "b="):
        with pytest.raises(ConfigError, match="is not of the form name=source"):
            load(environment={}, also=[wrong])


def test_a_difference_is_told_of_each_model_beside_the_first() -> None:
    config = from_tree({"models": {"b": {"decode": {"replicas": 2}}}})
    assert changes(config) == [
        ("models.b.model.served_name", None, "b"),
        ("models.b.decode.replicas", 1, 2),
    ]


def test_the_schema_knows_what_a_model_may_have_of_its_own() -> None:
    schema = settings_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    good = {"b": {"model": {"source": "x"}, "gateway": {"reasoning_parser": "qwen3"}}}
    jsonschema.validate({"models": good}, schema)
    of(good)
    wrongs: list[dict[str, Any]] = [
        {"store": {}},
        {"decode": {"replicas": "two"}},
        {"gateway": {"http_port": 1}},
    ]
    for wrong in wrongs:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"models": {"b": wrong}}, schema)
        with pytest.raises(ConfigError):
            of({"b": wrong})


@settings(max_examples=30)
@given(st.dictionaries(st.text(string.printable + "é模", min_size=1, max_size=12), st.just({})))
def test_names_that_are_taken_have_deployments_of_their_own(models: dict[str, Any]) -> None:
    """Of any names: refused, or with suffixes that differ and that Serve takes."""
    try:
        config = from_tree({"models": models})
    except ConfigError:
        return
    suffixes = [deployment_suffix(name) for name in further_models(config)]
    assert len({*suffixes, ""}) == len(suffixes) + 1
    allowed = set(string.ascii_lowercase + string.digits + "-")
    assert all(set(suffix) <= allowed for suffix in suffixes)
    again = from_tree(to_tree(config))
    assert further_models(again) == further_models(config)
