"""Machine code without a GPU. In processes of their own: here the interpreter may be on."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from pdserve.model.kernels.compile_all import KiB, Outcome


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def compile_all(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "pdserve.model.kernels.compile_all", "--jobs", "1", *arguments)


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Outcome("k", 80, stack_bytes=8), "spills 8 bytes"),
        (Outcome("k", 80, shared_bytes=163 * KiB + 1), "166913 bytes of shared memory, sm_80 has"),
        (Outcome("k", 90, shared_bytes=228 * KiB), "sm_90 has 232448"),
        (Outcome("k", 100, error="it does not compile"), "it does not compile"),
        (Outcome("k", 80, registers=255, shared_bytes=163 * KiB), ""),
        (Outcome("k", 100, registers=255, shared_bytes=227 * KiB), ""),
    ],
)
def test_an_outcome_says_what_is_wrong_with_it(outcome: Outcome, said: str) -> None:
    assert said in outcome.problem
    assert bool(outcome.problem) == bool(said)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_a_kernel_becomes_machine_code_and_its_figures_are_told(capability: str) -> None:
    ended = compile_all("--sm", capability, "--only", "decode_attention H=9")
    assert ended.returncode == 0, ended.stderr
    row = next(line for line in ended.stdout.splitlines() if line.startswith("decode_attention"))
    target, registers, shared_bytes = row.split()[-3:]
    assert target == f"sm_{capability}"
    assert 0 < int(registers) <= 255
    assert 0 < int(shared_bytes) <= 163 * KiB
    assert "1 of 1 compiled" in ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tiles", "said"),
    [
        ("rows=256, tokens=64, warps=4, stages=2", "spills"),
        ("rows=16, tokens=128, warps=8, stages=16", "shared memory"),
    ],
)
def test_absurd_tiles_are_reported_by_name_and_fail(tiles: str, said: str) -> None:
    """Guards the check itself: the tiles are replaced, and the command must fail."""
    script = f"""
        import sys
        from pdserve.model.kernels import attention, compile_all

        attention.decode_tiles = lambda *_, **__: attention.Tiles({tiles})
        arguments = ["--jobs", "1", "--sm", "80", "--only", "decode_attention H=9"]
        sys.exit(compile_all.main(arguments))
    """
    ended = python("-c", textwrap.dedent(script))
    assert ended.returncode == 1, ended.stderr
    assert said in ended.stderr
    assert "sm_80 decode_attention H=9 G=3 D=64 bfloat16" in ended.stderr


@pytest.mark.slow
def test_decode_and_prefill_run_the_same_matrix_instructions() -> None:
    """Goal: what the interpreter shows of equal bits carries over to GPUs.

    Method: the layouts of all matrix products and sums in the two kernels' GPU code are the same.
    """
    script = """
        import json, re
        from pdserve.model.kernels import attention
        from pdserve.model.kernels.compile_all import compile_kernel

        def layouts(configuration, capability):
            code = compile_kernel(configuration, capability).asm["ttgir"]
            names = dict(re.findall(r"^(#\\w+) = (.*)$", code, re.MULTILINE))
            products = re.findall(r"tt\\.dot .* -> tensor<\\w+, (#\\w+)>", code)
            sums = re.findall(r"\\}\\) : \\(tensor<\\w+xf32, (#\\w+)>\\)", code)
            return [sorted({names[name] for name in used}) for used in (products, sums)]

        found = []
        for configuration in attention.configurations():
            way, _, shape = configuration.name.partition("_attention ")
            for capability in (80, 90, 100) if way in ("decode", "prefill") else ():
                dtype = str(configuration.arguments["q_ptr"])
                found.append((way, shape, dtype, capability, *layouts(configuration, capability)))
        print(json.dumps(found))
    """
    ended = python("-c", textwrap.dedent(script))
    assert ended.returncode == 0, ended.stderr
    ways: dict[str, dict[tuple[str, str, int], object]] = {"decode": {}, "prefill": {}}
    for way, shape, dtype, capability, products, sums in json.loads(ended.stdout):
        assert products, "no matrix product was found; has the form of the compiler's code changed?"
        assert sums, "no sum was found; has the form of the compiler's code changed?"
        ways[way][shape, dtype, capability] = (products, sums)
    assert len(ways["decode"]) == 99
    assert ways["decode"] == ways["prefill"]


def test_an_unknown_name_is_refused() -> None:
    ended = compile_all("--only", "no_such_kernel")
    assert ended.returncode == 2
    assert "no configuration's name begins with 'no_such_kernel'" in ended.stderr


def test_the_interpreter_cannot_compile_and_says_so() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "pdserve.model.kernels.compile_all"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 2
    assert "unset it" in ended.stderr
