"""What it costs to have the package: the wheel, its dependencies, its import, its ``--help``.

    python -m bench.surface --only package

Times are of whole processes of a fresh interpreter, beside one that imports nothing, measured in
turn; the bars are what the package promises.
"""

import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from bench.frame import ROOT, Options, Row, at_most, interleave, row, skipped

MB = 1_000_000
WHEEL_MB_MAX = 3.0
DEPENDENCIES_MAX = 20
IMPORT_S_MAX = 0.3
HELP_S_MAX = 0.5
RUN_S_MAX = 300

WATCHES_NETWORK = """
import contextlib, io, socket, sys
asked = []
def refuse(*what):
    asked.append(what)
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
socket.create_connection = refuse
import pdserve
sys.argv = ["pdserve", "--help"]
from pdserve.cluster.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
import pdserve.cluster.offline
print(len(asked))
"""
"""Imports all that a program imports, ``LLM`` too, and counts who wanted the network."""


def rows(options: Options) -> Iterator[Row]:
    count = len(dependencies())
    yield row("direct dependencies", [count], "", bar=at_most(DEPENDENCIES_MAX))
    yield _wheel()
    took = interleave(
        options.rounds(15),
        nothing=lambda: timed("-c", "pass"),
        imported=lambda: timed("-c", "import pdserve"),
        help=lambda: timed("-m", "pdserve.cluster.cli", "--help"),
    )
    bare = took["nothing"]
    beside = "an interpreter alone"
    for name, samples, limit_s in (
        ("import pdserve", took["imported"], IMPORT_S_MAX),
        ("pdserve --help", took["help"], HELP_S_MAX),
    ):
        yield row(
            name, samples, "s", reference=beside, reference_samples=bare, bar=at_most(limit_s)
        )
    yield row("network asked for at import", [network_calls()], "", bar=at_most(0))


def dependencies(root: Path = ROOT) -> list[str]:
    """What the package asks for, extras left out."""
    with (root / "pyproject.toml").open("rb") as file:
        return list(tomllib.load(file)["project"]["dependencies"])


def packed_bytes(root: Path = ROOT) -> int:
    """About what a wheel takes: every file of the package, compressed as a wheel compresses. It
    needs no build, and counts a few kilobytes of metadata less."""
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted((root / "pdserve").rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".so":
                packed.write(file, file.relative_to(root))
    return len(out.getvalue())


def timed(*words: str) -> float:
    """Seconds until a fresh interpreter has ended."""
    begun_s = time.perf_counter()
    subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=RUN_S_MAX,
    )
    return time.perf_counter() - begun_s


def network_calls() -> int:
    """How often the network was asked for while everything was imported that a program imports."""
    said = subprocess.run(
        [sys.executable, "-c", WATCHES_NETWORK],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
    )
    return int(said.stdout)


def _wheel() -> Row:
    with tempfile.TemporaryDirectory() as directory:
        command = [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--wheel-dir", directory, str(ROOT)),
        ]
        built = subprocess.run(
            command, capture_output=True, text=True, timeout=RUN_S_MAX, check=False
        )
        wheels = [*Path(directory).glob("*.whl")]
        if built.returncode or not wheels:
            reason = f"pip wheel: {built.stderr.strip().splitlines()[-1:]}"
            return skipped("wheel", "MB", reason)
        return row("wheel", [wheels[0].stat().st_size / MB], "MB", bar=at_most(WHEEL_MB_MAX))
