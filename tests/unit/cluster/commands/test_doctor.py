"""``pdserve doctor`` looks and leaves nothing: what it finds about the directory of the sockets."""

import dataclasses
import os
from pathlib import Path

import pytest

from pdserve.cluster.commands import doctor as doctor_command
from pdserve.cluster.commands.doctor import Finding, examine
from pdserve.config import ClusterConfig
from pdserve.settings import from_tree
from tests.models.small import write_small_model


def _config(directory: Path) -> ClusterConfig:
    gateway = {"http_port": 0, "grpc_port": 0}
    return from_tree({"directory": str(directory), "gateway": gateway})


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.replace("\n", "")  # the console wraps long paths


def test_it_names_the_directory_of_the_sockets_and_does_not_make_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "deep" / "sockets"
    examine(_config(directory))
    assert f"sockets go to {directory}" in _said(capsys)
    assert list(tmp_path.iterdir()) == []


def test_it_says_how_the_weights_are_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    write_small_model(tmp_path / "m", config={"quantization_config": fields})
    config = _config(tmp_path)
    model = dataclasses.replace(config.model, source=str(tmp_path / "m"))
    examine(dataclasses.replace(config, model=model))
    assert "weights awq, 4 bits" in _said(capsys)


def test_a_directory_that_stands_already_is_as_good(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examine(_config(tmp_path))
    assert f"sockets go to {tmp_path}" in _said(capsys)


def test_a_place_that_cannot_be_written_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert not examine(_config(file / "sockets"))
    assert f"cannot write in {file}" in _said(capsys)


def test_somebody_elses_directory_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    assert not examine(_config(tmp_path))
    assert f"{tmp_path} belongs to somebody else" in _said(capsys)


def test_a_model_that_cannot_be_cut_so_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_small_model(tmp_path / "model")
    tree = {"directory": str(tmp_path / "s"), "model": {"source": str(model)}}
    assert not examine(from_tree({**tree, "decode": {"tensor_parallel": 3}}))
    assert "model: prefill.tensor_parallel and decode.tensor_parallel cut" in _said(capsys)
    examine(from_tree({**tree, "decode": {"tensor_parallel": 2}}))
    assert "model model: llama, 2 layers" in _said(capsys)


def test_a_remedy_stands_below_its_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding(True, "fine"), Finding(False, "broken", "mend it")]
    monkeypatch.setattr(doctor_command, "_findings", lambda _: iter(findings))
    assert not examine(_config(tmp_path))
    assert capsys.readouterr().out.split() == ["ok", "fine", "no", "broken", "mend", "it"]
