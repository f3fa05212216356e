import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.cluster.support.redacting import (
    MARK,
    secrets_in,
    settings_without_secrets,
    text_without_secrets,
    tree_without_secrets,
)
from pdserve.config import ClusterConfig
from pdserve.settings import to_tree

KEY = "pd-" + "0123456789abcdef" * 4
TOKEN = "eyJ" + "hbGciOiJIUzI1" + ".eyJ" + "zdWIiOiIxMjM0" + ".c2lnbmF0dXJl"
PEM = "-----BEGIN " + "PRIVATE KEY-----\nMIIEvQIBADANBg\nkqhkiG9w0BAQEF\n-----END PRIVATE KEY-----"
PROSE = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=60)


@given(PROSE, PROSE, st.sampled_from([KEY, TOKEN, PEM, "sk-" + "aB3" * 8, "hf_" + "aB3" * 8]))
def test_what_looks_like_a_key_goes_wherever_it_stands(before: str, after: str, key: str) -> None:
    assert key not in text_without_secrets(f"{before} {key} {after}")


@given(PROSE, st.text("abcdefghij0123456789/+=", min_size=6, max_size=40), PROSE)
def test_a_secret_that_is_known_goes_letter_by_letter(before: str, secret: str, after: str) -> None:
    said = text_without_secrets(f"{before}{secret}{after}", {secret})
    assert secret not in said.replace(MARK, "\n")


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | PROSE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PROSE, inner, max_size=3),
    max_leaves=12,
)


@given(TREES)
def test_twice_is_once(tree: Any) -> None:
    once = tree_without_secrets(tree)
    assert tree_without_secrets(once) == once
    json.dumps(once)


@pytest.mark.parametrize(
    ("line", "gone"),
    [
        ("authorization: Bearer abcdef123", "abcdef123"),
        ('headers {"x-api-key": "hunter2hunter2"}', "hunter2hunter2"),
        ("redis://ann:hunter2@10.0.0.1:6379/0", "hunter2"),
        ("PDSERVE_STORE__KEY_SALT=hunter2", "hunter2"),
        ("{'HF_TOKEN': 'hunter2'}", "hunter2"),
        ("password=hunter2, port=3", "hunter2"),
        ('{"prompt": "the cat sat", "n": 1}', "the cat sat"),
        ("Request(prompt='the cat sat', n=1)", "the cat sat"),
        ('{"messages": [{"role": "user", "content": "the cat sat"}]}', "the cat sat"),
        ("prompt_token_ids=[17, 4711]", "4711"),
        ('"text": "the cat sat', "the cat sat"),
    ],
)
def test_a_line_of_a_log_loses_it(line: str, gone: str) -> None:
    assert gone not in text_without_secrets(line)


@pytest.mark.parametrize(
    "line",
    [
        "prompt_tokens=812 max_tokens: 16, 3 tokens waited",
        '{"prompt_tokens": 3, "cached_tokens": 0, "level": 2}',
        "GET http://10.0.0.1:8000/v1/models 200",
        "tokens per second: 101",
        "listening on tcp://10.0.0.1:7000",
    ],
)
def test_what_tells_nothing_stays(line: str) -> None:
    assert text_without_secrets(line) == line


def test_settings_lose_secrets_and_keep_the_paths_of_keys() -> None:
    config = ClusterConfig()
    config = replace(
        config,
        store=replace(
            config.store,
            key_salt="hunter2hunter2",
            redis_url="redis://:hunter2@r:6379/0",
            key_file="/etc/pdserve/key",
        ),
        gateway=replace(config.gateway, api_keys="/etc/pdserve/keys.json"),
    )
    shown = settings_without_secrets(config)
    assert "hunter2" not in json.dumps(shown)
    assert shown["store"]["key_salt"] == MARK
    assert shown["store"]["redis_url"] == f"redis://{MARK}@r:6379/0"
    assert shown["gateway"]["api_keys"] == "/etc/pdserve/keys.json"


@dataclass(frozen=True)
class Hidden:
    colour: str = field(default="hunter2", repr=False)
    empty: str = field(default="", repr=False)
    size: int = 3


def test_what_a_class_does_not_show_of_itself_is_secret() -> None:
    assert settings_without_secrets(Hidden()) == {"colour": MARK, "empty": "", "size": 3}


def test_settings_without_a_secret_are_shown_as_they_are() -> None:
    assert settings_without_secrets(ClusterConfig()) == to_tree(ClusterConfig())


def test_a_secret_of_the_environment_is_known_by_its_variables_name() -> None:
    environment = {"HF_TOKEN": "a", "PDSERVE_API_KEY": "b", "PATH": "/bin", "AWS_SECRET": ""}
    assert secrets_in(environment) == {"a", "b"}


@pytest.mark.parametrize("letters", ["a", "a.", "a-", "eyJ-", "eyJaaaaaaaa.", "://", "'prompt' "])
def test_no_line_takes_long_however_it_is_made(letters: str) -> None:
    """Quadratic time would let this run into the test's own limit by far."""
    line = letters * (128_000 // len(letters))
    assert len(text_without_secrets(line)) <= len(line) + 100
