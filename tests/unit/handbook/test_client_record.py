"""A client's version is the one of the environment that it ran in."""

import importlib.metadata
from pathlib import Path

import pytest

from handbook import client_record
from handbook.client_record import version_of


@pytest.fixture
def environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(client_record, "ENVIRONMENTS", tmp_path)
    return tmp_path


def install(environments: Path, environment: str, package: str, version: str) -> None:
    place = environments / environment / "lib" / "python3" / "site-packages"
    metadata = place / f"{package.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def test_it_is_found_where_the_package_s_name_begins_with_the_environment_s(
    environments: Path,
) -> None:
    install(environments, "aiperf", "langchain-openai", "1")  # brought along
    install(environments, "langchain", "langchain-openai", "2")
    install(environments, "lm_eval", "lm-eval", "3")
    assert version_of("langchain-openai") == "2"
    assert version_of("lm-eval") == "3"


def test_one_of_ours_is_ours_whatever_others_bring(environments: Path) -> None:
    install(environments, "aiperf", "pytest", "0.0.1")
    assert version_of("pytest") == importlib.metadata.version("pytest")


def test_what_is_nowhere_has_no_version(environments: Path) -> None:
    assert version_of("no-such-client") == ""
