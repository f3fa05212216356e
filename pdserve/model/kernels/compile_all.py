"""Machine code of every kernel, in every configuration, for every GPU generation; without a GPU.

    python -m pdserve.model.kernels.compile_all

Compiles what each kernel file's ``configurations()`` names, asks the assembler's own figures of
the result, prints a table, and ends with exit code 1 when a kernel keeps variables in slow memory
because its registers are too few (a *spill*), needs more shared memory than the generation has, or
does not compile at all. Otherwise a broken kernel would be found at its first launch on such a GPU,
and a spill would never be found, only felt.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pdserve.model.kernels import (
    attention,
    blocks,
    fp8_linear,
    grouped_linear,
    norm,
    rope,
    sampling,
    silu,
    store_blocks,
)
from pdserve.model.kernels.configuration import OPTIONS, Configuration

KiB = 1 << 10

SHARED_BYTES_MAX = {80: 163 * KiB, 90: 227 * KiB, 100: 227 * KiB}
"""What one program may have of a multiprocessor's shared memory, by compute capability. CUDA C++
Programming Guide, table of technical specifications."""

MODULES: tuple[ModuleType, ...] = (
    attention,
    norm,
    rope,
    silu,
    blocks,
    sampling,
    grouped_linear,
    fp8_linear,
    store_blocks,
)

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_ALIGNED = 16  # bytes of a pointer, or the value of an integer: Triton's launcher looks for this


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one configuration on one generation."""

    name: str
    capability: int
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    error: str = ""

    @property
    def problem(self) -> str:
        """Why this must not ship, or nothing."""
        shared_bytes_max = SHARED_BYTES_MAX[self.capability]
        problems = [self.error] if self.error else []
        if self.stack_bytes > 0:
            problems.append(
                f"spills {self.stack_bytes} bytes per thread: use smaller tiles or more warps"
            )
        if self.shared_bytes > shared_bytes_max:
            problems.append(
                f"needs {self.shared_bytes} bytes of shared memory, sm_{self.capability} has "
                f"{shared_bytes_max}: use smaller tiles or fewer stages"
            )
        return "; ".join(problems)


def compile_kernel(configuration: Configuration, capability: int) -> triton.compiler.CompiledKernel:
    """The configuration as the launcher would compile it on a GPU of this generation."""
    signature: dict[str, str] = {}
    constants = dict(configuration.constants)
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, name in enumerate(configuration.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        argument = configuration.arguments[name]
        if isinstance(argument, torch.dtype):
            signature[name] = _POINTERS[argument]
        else:
            signature[name] = "fp32" if isinstance(argument, float) else "i32"
        specialised = not configuration.kernel.params[index].do_not_specialize
        if isinstance(argument, torch.dtype) or (
            specialised and isinstance(argument, int) and argument % _ALIGNED == 0
        ):
            attributes[index,] = [["tt.divisibility", _ALIGNED]]
    source = ASTSource(configuration.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={**OPTIONS, **configuration.options})


def outcome_of(configuration: Configuration, capability: int) -> Outcome:
    name = f"{configuration.name} {_dtype_name(configuration)}"
    try:
        compiled = compile_kernel(configuration, capability)
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        return Outcome(name, capability, error=f"{type(error).__name__}: {reason[-1]}")
    registers, stack_bytes = _resources(compiled.asm["cubin"])
    return Outcome(name, capability, registers, stack_bytes, compiled.metadata.shared)


def _dtype_name(configuration: Configuration) -> str:
    dtypes = [a for a in configuration.arguments.values() if isinstance(a, torch.dtype)]
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return str(min(floating, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of each thread. Our kernels have no arrays of their own, so
    whatever is on the stack was spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert found, f"cuobjdump said {report!r}"
    return int(found[1]), int(found[2]) + int(found[3])


def all_configurations() -> list[Configuration]:
    return [configuration for module in MODULES for configuration in module.configurations()]


def _outcome_at(index: int, capability: int) -> Outcome:
    """By index: a kernel is no value that could be sent to another process."""
    return outcome_of(all_configurations()[index], capability)


def _outcomes(jobs: Sequence[tuple[int, int]], process_count: int) -> list[Outcome]:
    if process_count == 1:
        return [_outcome_at(*job) for job in jobs]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(process_count, mp_context=context) as pool:
        return list(pool.map(_outcome_at, *zip(*jobs, strict=True)))


def table(outcomes: Sequence[Outcome]) -> str:
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [f"{'kernel':{width}}  target  registers  shared bytes"]
    for outcome in outcomes:
        figures = f"{outcome.registers:9}  {outcome.shared_bytes:12}"
        mark = f"  FAILS: {outcome.problem}" if outcome.problem else ""
        lines.append(f"{outcome.name:{width}}  sm_{outcome.capability:<4} {figures}{mark}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes to compile in")
    parser.add_argument(
        "--sm", type=int, action="append", choices=SHARED_BYTES_MAX, help="only this capability"
    )
    parser.add_argument("--only", default="", help="only configurations whose names begin so")
    options = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: nothing can be compiled; unset it", file=sys.stderr)
        return 2
    started_s = time.monotonic()
    jobs = [
        (index, capability)
        for index, configuration in enumerate(all_configurations())
        if configuration.name.startswith(options.only)
        for capability in options.sm or SHARED_BYTES_MAX
        if capability >= configuration.capability_min
    ]
    if not jobs:
        print(f"no configuration's name begins with {options.only!r}", file=sys.stderr)
        return 2
    outcomes = _outcomes(jobs, options.jobs)
    print(table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.problem]
    print(
        f"{len(jobs) - len(failed)} of {len(jobs)} compiled without spills and within shared "
        f"memory, in {time.monotonic() - started_s:.0f} s"
    )
    for outcome in failed:
        print(f"sm_{outcome.capability} {outcome.name}: {outcome.problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
