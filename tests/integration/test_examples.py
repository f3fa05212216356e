"""The programs in examples/ and what they are built on, each run as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdserve import LLM, SamplingParams
from pdserve.errors import ConfigError, PdserveError
from tests.integration.harness import TestCluster, end_shared, random_prompts

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = sorted(EXAMPLES.glob("*.py"))


def test_there_are_examples() -> None:
    assert len(PROGRAMS) >= 5


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: str(program.stem))
def test_an_example_runs(program: Path, cluster: TestCluster) -> None:
    environment = {
        **os.environ,
        "PDSERVE_URL": cluster.url,
        "PDSERVE_GRPC": cluster.cluster.grpc,
    }
    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_batch_has_the_answers_that_each_prompt_has_alone(cluster: TestCluster) -> None:
    prompts = random_prompts(8, seed=12, length=40)
    with LLM(address=cluster.cluster.grpc) as llm:
        sampling = SamplingParams(max_tokens=12, temperature=0.9, seed=3, n=2, ignore_eos=True)
        answers = llm.generate(prompts, sampling)
        assert [answer.prompt for answer in answers] == prompts
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.prompt_tokens == len(prompt)
            assert [output.finish_reason for output in answer.outputs] == ["length"] * 2
            (alone,) = llm.generate(prompt, sampling)
            assert [o.token_ids for o in alone.outputs] == [o.token_ids for o in answer.outputs]
        (said,) = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(regex="[ab]{3}"))
        assert set(said.outputs[0].text) <= set("ab")
        with pytest.raises(PdserveError, match="temperature"):
            llm.generate(["x", "y"], SamplingParams(temperature=9.0))


def test_settings_belong_to_a_cluster_of_one_s_own() -> None:
    with pytest.raises(ConfigError, match="address"):
        LLM("model.gguf", address="127.0.0.1:1")
    with pytest.raises(ConfigError, match="leave one out"):
        SamplingParams(regex="a", json_schema={}).message()


@pytest.mark.slow
def test_a_cluster_lives_as_long_as_its_program(small_model: Path) -> None:
    end_shared()
    code = f"""
from pdserve import LLM
with LLM({str(small_model)!r}, settings={{"store.arena_bytes": 1 << 26}}) as llm:
    print(llm.generate("hello")[0].outputs[0].token_ids)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split(",")) == 16
