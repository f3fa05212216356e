"""``kernels.cpp`` as a loaded library: compiled once per machine, kept in a cache folder.

The file's name is a digest of all that goes in: sources, compiler, flags, this CPU's features and
the OpenMP runtime. So a cache folder on a shared disk serves unlike machines, and a new source
never meets an old library. Processes that start together compile once: the first holds a file lock,
the others wait for it, at most as long as a compilation may take.

torch's OpenMP runtime is linked, not the compiler's own: two runtimes keep two sets of threads, and
each spins while the other works.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from pathlib import Path

from pdserve.compiled import cache_directory

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-shared")
_COMPILE_TIMEOUT_S = 300
_logger = logging.getLogger(__name__)

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
LAYERS_WRITTEN = ctypes.CFUNCTYPE(None, _SIZE)
_ROWS = (_POINTER, _SIZE)  # a first row, and the elements from one row to the next
_CACHE = (_SIZE,) * 7  # whether it is coded, and ``Cache`` of ``pool.h``
_SIGNATURES = {
    "rms_norm": (*_ROWS, _POINTER, _POINTER, _SIZE, _SIZE, _FLOAT),
    "add_rms_norm": (*(_POINTER,) * 5, _SIZE, _SIZE, _FLOAT),
    "silu_mul": (_POINTER, _POINTER, _SIZE, _SIZE),
    "gelu_mul": (_POINTER, _POINTER, _SIZE, _SIZE),
    "rope_and_cache": (*_ROWS * 3, *(_POINTER,) * 5, *_CACHE, _SIZE, _SIZE),
    "linear": (*_ROWS, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE),
    "attention": (*(_POINTER,) * 6, _SIZE, _SIZE, *_CACHE, _SIZE, _FLOAT, _SIZE),
}  # between the type, which comes first, and the threads, which come last


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The kernels, compiled now if they never were; None, with one warning, if they cannot be."""
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        _logger.warning(
            "the C++ kernels cannot be built, the slower torch path runs instead; install g++, or "
            "set CXX to a compiler: %s",
            detail,
        )
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, f"pdserve_{name}")
        function.argtypes = (_INT, *arguments, _INT)
        function.restype = None
    library.pdserve_bind_threads.argtypes = (_POINTER, _INT)
    library.pdserve_bind_threads.restype = _INT
    library.pdserve_layers.argtypes = (
        *(*(_POINTER,) * 4, _FLOAT, _FLOAT, *(_POINTER,) * 8),
        *(LAYERS_WRITTEN, _SIZE, _INT),
    )
    library.pdserve_layers.restype = None
    library.pdserve_has_linear.argtypes = ()
    library.pdserve_has_linear.restype = _INT
    library.pdserve_packed_bytes.argtypes = (_SIZE, _SIZE, _SIZE)
    library.pdserve_packed_bytes.restype = _SIZE
    library.pdserve_pack_linear.argtypes = (_SIZE, _POINTER, _POINTER, _SIZE, _SIZE, _INT)
    library.pdserve_pack_linear.restype = None
    library.pdserve_unpacked_rows.argtypes = (_SIZE, *(_POINTER,) * 3, _SIZE, _SIZE, _INT)
    library.pdserve_unpacked_rows.restype = None
    return library


def _built() -> Path:
    compiler = os.environ.get("CXX", "g++")
    version = _output(compiler, "--version")
    runtime = _loaded_openmp()
    features = _cpu_features()
    digest = hashlib.blake2b(digest_size=12)
    sources = (path.read_text() for path in (_SOURCE, *sorted(_SOURCE.parent.glob("*.h"))))
    for part in (*sources, version, " ".join(_FLAGS), str(runtime), features):
        digest.update(part.encode() + b"\0")
    target = cache_directory() / "kernels" / f"{digest.hexdigest()}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():  # another process may have been first
            _compile(compiler, runtime, target)
    return target


def _compile(compiler: str, runtime: Path | None, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        built = Path(directory) / "kernels.so"
        objects = [str(_SOURCE), *([str(runtime)] if runtime else [])]
        _output(compiler, *_FLAGS, "-o", str(built), *objects)
        built.rename(target)  # whole or not at all


def _output(*command: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S
    ).stdout


def _loaded_openmp() -> Path | None:
    """The OpenMP runtime that torch brought into this process; None if it is not GNU's."""
    import torch  # noqa: F401  (loads it)

    maps = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else ""
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "libgomp" in line}
    return Path(min(paths)) if paths else None


def _cpu_features() -> str:
    """What ``-march=native`` looks at; on Linux, the flags of the first core."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
