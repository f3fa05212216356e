"""Kernels run compiled where there is a CUDA device, and in Triton's interpreter elsewhere."""

import importlib.util
import os
import sys

import torch

if not torch.cuda.is_available():
    # Triton decides at its import; too late would mean a confusing error in the first kernel.
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", (
        "triton was imported before TRITON_INTERPRET=1 was set; set it for the whole test run"
    )
    os.environ["TRITON_INTERPRET"] = "1"

_FILES = ("gguf", "safetensors")
_HAS_FILES = all(importlib.util.find_spec(name) for name in _FILES)
collect_ignore = [] if _HAS_FILES else ["test_triton_runner.py"]  # whole models come from files


def pytest_report_header() -> str:
    return "" if _HAS_FILES else f"{', '.join(collect_ignore)} left out: needs {', '.join(_FILES)}"
