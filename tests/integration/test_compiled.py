"""The router and the simulator as ``pdserve compile`` builds them decide as their sources do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pdserve import compiled
from pdserve.cluster.commands.compile import compile_here
from pdserve.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

DECIDE = """
import json, sys
from pathlib import Path
from pdserve import compiled
from pdserve.router_config import RouterConfig
from pdserve.router import core, placement
from pdserve.router.orders import skip_join
from pdserve.simulator import run, worker
from pdserve.simulator.settings import SimulationSettings
from pdserve.simulator.synthetic import exponential, poisson

hashes = []
for policy, mode in (("skip_join", "disaggregated"), ("fcfs", "auto"), ("hrrn", "aggregated")):
    settings = SimulationSettings(
        router=RouterConfig(policy=policy, mode=mode), prefill_workers=2, decode_workers=2
    )
    trace = poisson(300, 2.0, seed=7, prompt=exponential(4000))
    hashes.append(run.simulate(trace, settings).decisions_sha256)
files = [module.__file__ for module in (core, placement, skip_join, run, worker)]
print(json.dumps([compiled.is_in_use(), files, hashes]))
"""


@pytest.fixture(scope="module")
def build() -> Path:
    """Of these sources; kept where users' builds are, so that it is built once."""
    try:
        return compile_here()
    except ConfigError as error:
        if "there is no C compiler" in str(error):
            pytest.skip(str(error))
        raise


def decided(*, compiled_too: bool) -> tuple[bool, list[str], list[str]]:
    environment = os.environ | {"PDSERVE_COMPILED": "1" if compiled_too else "0"}
    said = subprocess.run(
        [sys.executable, "-c", DECIDE], env=environment, cwd=ROOT, check=True, timeout=120,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    in_use, files, hashes = json.loads(said.stdout)
    return in_use, files, hashes


def test_compiled_modules_take_the_decisions_of_their_sources(build: Path) -> None:
    in_use, files, hashes = decided(compiled_too=True)
    assert in_use
    assert all(Path(file).is_relative_to(build) and file.endswith(".so") for file in files)
    interpreted, sources, expected = decided(compiled_too=False)
    assert not interpreted
    assert all(Path(file).is_relative_to(ROOT) for file in sources)
    assert hashes == expected
    assert len(set(hashes)) == len(hashes)


@pytest.mark.usefixtures("build")
def test_compiled_modules_pass_the_tests_of_their_sources() -> None:
    """All of those who use them that need no fake that inherits from them, and no other constant
    in one: a compiled class tells less of itself, and its constants are fixed."""
    tests = [
        *("tests/golden", "tests/unit/simulator", "--ignore=tests/unit/simulator/test_keys.py"),
        *("tests/unit/cluster/commands", "tests/unit/cluster/test_profiles.py"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests],
        env=os.environ | {"PDSERVE_COMPILED": "1"}, cwd=ROOT, check=False, timeout=240,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


def test_a_build_is_found_by_the_sources_that_it_was_made_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PDSERVE_CACHE", str(tmp_path))
    monkeypatch.setenv("PDSERVE_COMPILED", "1")
    compiled.build_directory.cache_clear()
    path = ["installed"]
    compiled.prefer_compiled(path)
    assert path == ["installed"], "nothing was built"

    package = compiled.build_directory() / "pdserve"
    package.mkdir(parents=True)
    compiled.prefer_compiled(path)
    assert path == [str(package), "installed"]

    other = shutil.copytree(compiled.PACKAGE, tmp_path / "other")
    with (other / "router/levels.py").open("a") as file:
        file.write("# changed\n")
    monkeypatch.setattr(compiled, "PACKAGE", other)
    compiled.build_directory.cache_clear()
    path = ["installed"]
    compiled.prefer_compiled(path)
    assert path == ["installed"], "the sources are others"
    compiled.build_directory.cache_clear()


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PDSERVE_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    compiled.build_directory.cache_clear()
    with pytest.raises(ConfigError, match="no C compiler 'no-such-compiler'; install gcc"):
        compile_here()
    compiled.build_directory.cache_clear()
