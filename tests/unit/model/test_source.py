"""Which files a source means, and what is said when it means none."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pdserve.config import DEFAULT_MODEL, ModelConfig
from pdserve.errors import ConfigError
from pdserve.model import source
from pdserve.model.source import ModelFiles, fingerprint, locate
from tests.models.small import write_small_model


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any model: another home, another working directory, no package."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PDSERVE_MODEL_DIR", raising=False)
    monkeypatch.setattr(source, "_DEFAULT_PACKAGE", "no_such_package")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_directory_of_safetensors_is_found(tmp_path: Path) -> None:
    directory = write_small_model(tmp_path / "my-model")
    assert locate(ModelConfig(source=str(directory))) == ModelFiles(
        "my-model", "safetensors", directory
    )


def test_a_gguf_file_is_found_by_itself_and_by_its_directory(tmp_path: Path) -> None:
    file = tmp_path / "some.gguf"
    file.touch()
    assert locate(ModelConfig(source=str(file))) == ModelFiles("some", "gguf", file)
    assert locate(ModelConfig(source=str(tmp_path))).path == file


@pytest.mark.parametrize(
    ("quantised", "is_stored"),
    [({"quant_method": "gptq", "bits": 8, "group_size": 128}, "gptq, 8 bits"), (None, "plain")],
)
def test_weights_stored_otherwise_than_they_must_be_are_refused(
    tmp_path: Path, quantised: dict[str, Any] | None, is_stored: str
) -> None:
    write_small_model(tmp_path / "m", config={"quantization_config": quantised})
    config = ModelConfig(source=str(tmp_path / "m"), stored_as="awq")
    says = f"stored_as .* is awq, but the weights of m are {is_stored}; leave it out"
    with pytest.raises(ConfigError, match=says):
        locate(config)
    gptq = dataclasses.replace(config, stored_as="gptq")
    if quantised:
        assert locate(gptq).name == "m"


def test_a_gguf_file_is_stored_as_gguf(tmp_path: Path) -> None:
    file = tmp_path / "some.gguf"
    file.touch()
    assert locate(ModelConfig(source=str(file), stored_as="gguf")).path == file
    with pytest.raises(ConfigError, match="is fp8, but the weights of some are gguf"):
        locate(ModelConfig(source=str(file), stored_as="fp8"))


def test_the_served_name_wins(tmp_path: Path) -> None:
    directory = write_small_model(tmp_path)
    assert locate(ModelConfig(source=str(directory), served_name="mine")).name == "mine"


@pytest.mark.parametrize("place", [".models", "home/.cache/pdserve/models", "named"])
def test_the_default_model_is_looked_for_in_its_places(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    file = nowhere / place / source.DEFAULT_FILE
    file.parent.mkdir(parents=True)
    file.touch()
    if place == "named":
        monkeypatch.setenv("PDSERVE_MODEL_DIR", str(file.parent))
    assert locate(ModelConfig()) == ModelFiles(DEFAULT_MODEL, "gguf", file)


def test_the_default_model_is_found_in_its_package_without_importing_it(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = nowhere / "site" / "brings_a_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / source.DEFAULT_FILE).touch()
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(source, "_DEFAULT_PACKAGE", "brings_a_model")
    assert locate(ModelConfig()).path == package / source.DEFAULT_FILE


def test_a_missing_default_model_says_where_it_was_looked_for(nowhere: Path) -> None:
    with pytest.raises(ConfigError, match="make serve") as raised:
        locate(ModelConfig())
    assert str(nowhere / ".models") in str(raised.value)


@pytest.mark.parametrize("name", ["no-such-model", "./a/b", "/a/b", "~/a", "a/b/c", "a/b:c.bin"])
def test_a_source_that_is_nothing_is_refused(nowhere: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no such file or directory"):
        locate(ModelConfig(source=name))


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"found 0\); name the .gguf file"):
        locate(ModelConfig(source=str(tmp_path)))


def test_a_directory_with_two_gguf_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ConfigError, match="found 2"):
        locate(ModelConfig(source=str(tmp_path)))


def test_a_single_safetensors_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    directory = write_small_model(tmp_path)
    with pytest.raises(ConfigError, match="name the directory"):
        locate(ModelConfig(source=str(directory / "model.safetensors")))


def test_equal_weights_have_equal_fingerprints_wherever_they_lie(tmp_path: Path) -> None:
    prints = [
        fingerprint(ModelFiles(name, "safetensors", write_small_model(tmp_path / name)))
        for name in ("here", "there")
    ]
    assert prints[0] == prints[1]


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    prints = {
        fingerprint(
            ModelFiles("m", "safetensors", write_small_model(tmp_path / str(seed), seed=seed))
        )
        for seed in range(3)
    }
    assert len(prints) == 3


@pytest.mark.parametrize("at", [0.0, 0.37, 0.999])
def test_a_changed_thousandth_of_a_large_file_changes_the_fingerprint(
    tmp_path: Path, at: float
) -> None:
    path = tmp_path / "m.gguf"
    size = 8 << 20
    path.write_bytes(bytes(size))
    before = fingerprint(ModelFiles("m", "gguf", path))
    with path.open("r+b") as file:
        file.seek(int(at * size))
        file.write(b"x" * (size // 1000))
        file.truncate(size)
    assert fingerprint(ModelFiles("m", "gguf", path)) != before
