"""``pdserve compile``: router, simulator and the CPU's kernels to machine code, for this machine.

Of router and simulator mypyc translates the modules that decide, with the types that mypy checked;
the C compiler does the rest. Left out is what decides nothing, and what mypyc cannot translate.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from pdserve.cluster.commands.bars import spinner
from pdserve.compiled import FOLDERS, PACKAGE, build_directory
from pdserve.errors import ConfigError

INTERPRETED = {
    # ``commands`` are ``values``, which mypyc would make slower.
    "router": {"analytic", "commands", "fitting", "scaling", "signals", "snapshot"},
    # What a report shows, what other processes are sent, what traces become.
    "simulator": {
        "adversaries", "charts", "page", "report", "result", "settings", "synthetic", "traces",
        "transformations",
    },
}  # fmt: skip

OPTIMISATION = "2"
BUILD_S_MAX = 3600
"""A minute on a core of its own, a quarter of an hour on one that is shared by many."""

MYPY_OPTIONS = ["--config-file=", "--ignore-missing-imports", "--disable-error-code=import-untyped"]


def compile_here() -> Path:
    """Builds them, unless there is a build of these very sources. About a minute on one core.

    Returns:
        the build's folder.

    Raises:
        ConfigError: mypyc or a C compiler is missing, failed, or took too long.
    """
    target = build_directory()
    if target.is_dir():
        return target
    if find_spec("mypyc") is None:
        raise ConfigError("mypyc is not installed; pip install 'pdserve[compile]'")
    compiler = os.environ.get("CC") or str(sysconfig.get_config_var("CC"))  # as setuptools takes it
    if shutil.which(compiler.split()[0]) is None:
        raise ConfigError(f"there is no C compiler {compiler!r}; install gcc, or set CC to one")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = _build(Path(scratch))
        try:
            built.rename(target)  # whole or not at all
        except OSError:
            if not target.is_dir():  # another process may have been first
                raise
    return target


def modules() -> list[Path]:
    """The modules to compile, by their paths below the package."""
    return [
        file.relative_to(PACKAGE)
        for folder in FOLDERS
        for file in sorted((PACKAGE / folder).rglob("*.py"))
        if file.name != "__init__.py" and file.stem not in INTERPRETED[folder]
    ]


def _build(scratch: Path) -> Path:
    """Copies of the folders in ``scratch``, with the compiled modules; in a process of its own,
    since mypyc works in the current directory and exits where it fails."""
    package = scratch / "out" / PACKAGE.name
    for folder in FOLDERS:
        shutil.copytree(PACKAGE / folder, package / folder, ignore=_caches)
    command = [sys.executable, "-c", _PROGRAM, str(scratch), OPTIMISATION, *MYPY_OPTIONS]
    command += [str(Path(PACKAGE.name) / module) for module in modules()]
    try:
        done = subprocess.run(
            command,
            cwd=PACKAGE.parent,
            capture_output=True,
            text=True,
            timeout=BUILD_S_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"the router was not compiled within {BUILD_S_MAX} s; try again when the machine has "
            "less to do. Until then Python interprets it"
        ) from None
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
        raise ConfigError(f"the router could not be compiled:\n{said}")
    return scratch / "out"


_caches = shutil.ignore_patterns("__pycache__", "*.so")

_PROGRAM = """
import sys
from setuptools import Distribution
from mypyc.build import mypycify

scratch, optimisation, *paths = sys.argv[1:]
sys.argv = sys.argv[:1]
modules = mypycify(
    paths, opt_level=optimisation, debug_level="0", group_name="pdserve.decisions",
    target_dir=f"{scratch}/c",
)
for module in modules:  # one unit: its functions are inlined, and called without a table
    module.extra_compile_args += ["-fno-semantic-interposition"]
build = Distribution({"ext_modules": modules}).get_command_obj("build_ext")
build.build_lib, build.build_temp = f"{scratch}/out", f"{scratch}/objects"
build.ensure_finalized()
build.run()
"""


def compile_and_tell() -> None:
    console = Console(highlight=False)
    _compile_kernels(console)
    if not build_directory().is_dir():
        console.print("compiling the router and the simulator: about a minute", style="dim")
    with spinner("compiling", console):
        built = compile_here()
    console.print(f"compiled: {built}", soft_wrap=True, style="dim")


def _compile_kernels(console: Console) -> None:
    """The model's C++ for this CPU, which the first worker would have to wait for otherwise."""
    from pdserve.model.cpu.library import load_library

    with spinner("compiling the CPU's kernels", console):
        library = load_library()  # where it cannot be built, it says so and what to do
    if library is not None:
        console.print("compiled: the CPU's kernels", style="dim")
