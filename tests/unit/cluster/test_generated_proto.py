"""The committed Python of ``proto/`` is what the generator makes of it today."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FOLDER = "pdserve/proto/v1"
GENERATED = ("inference_pb2.py", "inference_pb2.pyi", "inference_pb2_grpc.py")


def test_the_generated_files_are_current(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    committed = {name: (ROOT / FOLDER / name).read_text() for name in GENERATED}
    made_by = f"GRPC_GENERATED_VERSION = '{version('grpcio-tools')}'"
    if made_by not in committed["inference_pb2_grpc.py"]:
        pytest.skip(f"the files were made by another grpcio-tools than {version('grpcio-tools')}")
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-I{FOLDER}=proto/pdserve/v1"),
            *out,
            f"{FOLDER}/inference.proto",
        ],
        cwd=ROOT,
        check=True,
    )
    for name in GENERATED:
        assert (tmp_path / FOLDER / name).read_text() == committed[name], f"run make proto: {name}"
