"""Tokenizers for tests: a small one that is always there, and the default model's."""

from pathlib import Path

import pytest

from pdserve.config import ModelConfig
from pdserve.errors import ConfigError
from pdserve.model.source import locate
from pdserve.text.tokenizer import Tokenizer, load_tokenizer
from tests.unit.text.support import byte_level, sentencepiece, write_gguf

PIECES = ("▁t", "he", "▁the", "in", "▁", *"theinaé", "▁a", "an", "▁thein")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_gguf(tmp_path_factory.mktemp("small") / "a.gguf", byte_level()))


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("pieces") / "a.gguf"
    return load_tokenizer(write_gguf(path, sentencepiece(PIECES)))


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    try:
        return locate(ModelConfig()).path
    except ConfigError as error:
        pytest.skip(f"the default model is not here: {error}")


@pytest.fixture(scope="session")
def smollm(default_gguf: Path) -> Tokenizer:
    return load_tokenizer(default_gguf)
