"""The schema of the settings: it allows what can be used, and refuses what cannot be read."""

import dataclasses
from typing import Any

import jsonschema
import pytest

from pdserve.config import ClusterConfig
from pdserve.errors import ConfigError
from pdserve.settings import changes, from_tree, to_tree
from pdserve.settings_schema import settings_schema

SCHEMA = settings_schema()


def test_the_defaults_are_what_it_allows() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    tree = to_tree(ClusterConfig())
    jsonschema.validate(tree, SCHEMA)
    assert from_tree(tree) == ClusterConfig()


@pytest.mark.parametrize(
    "tree",
    [
        {"router": {"polcy": "fcfs"}},
        {"router": {"policy": "random"}},
        {"decode": {"replicas": "two"}},
        {"gateway": 4},
        {"tcp": "yes"},
    ],
)
def test_what_cannot_be_read_is_refused_by_both(tree: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, SCHEMA)
    with pytest.raises(ConfigError):
        from_tree(tree)


def test_every_setting_is_there_with_its_default_and_its_words() -> None:
    def compare(schema: dict[str, Any], default: Any) -> None:
        assert list(schema["properties"]) == [each.name for each in dataclasses.fields(default)]
        for name, said in schema["properties"].items():
            value = getattr(default, name)
            if dataclasses.is_dataclass(value):
                compare(said, value)
            else:
                assert said["default"] == value

    compare(SCHEMA, ClusterConfig())
    store = SCHEMA["properties"]["store"]["properties"]
    assert store["ticket_wait_ms"]["description"].startswith("How long a hand-off waits")
    assert SCHEMA["properties"]["drain_timeout_s"]["description"].startswith("How long a worker")


def test_changes_are_told_by_name() -> None:
    config = from_tree({"decode": {"replicas": 3}, "router": {"goal": "tail"}})
    assert changes(ClusterConfig()) == []
    assert changes(config) == [
        ("decode.replicas", ClusterConfig().decode.replicas, 3),
        ("router.goal", ClusterConfig().router.goal, "tail"),
    ]
