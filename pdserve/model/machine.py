"""What torch finds on this machine, for those who may not import torch."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Machine:
    torch: str  # version, with its build
    gpu: str | None  # the name of the first CUDA device


def machine() -> Machine:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Machine(torch.__version__, gpu)
