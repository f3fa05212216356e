"""vLLM's command lines: what each flag sets, what is said of it, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pdserve.cluster import cli
from pdserve.cluster.commands import serve as serve_command
from pdserve.cluster.commands.vllm_flags import FLAGS, translate
from pdserve.config import ClusterConfig
from pdserve.errors import ConfigError
from pdserve.settings import to_tree

DOCS = Path(__file__).parents[4] / "docs" / "from_vllm.md"


class Started:
    """Stands for the cluster that ``serve`` would start, and keeps what it was to be."""

    config: ClusterConfig
    notes: tuple[str, ...]

    def run(self, config: ClusterConfig, **how: Any) -> None:
        self.config = config
        self.notes = how["notes"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    started = Started()
    monkeypatch.setattr(serve_command, "run", started.run)
    return started


def serve(line: str) -> None:
    CliRunner().invoke(cli.app, ["serve", *line.split()], catch_exceptions=False)


def changes(config: ClusterConfig) -> dict[str, Any]:
    """What differs from the defaults."""
    default = to_tree(ClusterConfig())
    return {
        f"{part}.{name}": value
        for part, fields in to_tree(config).items()
        if isinstance(fields, dict)
        for name, value in fields.items()
        if value != default[part][name]
    }


def test_a_command_line_from_the_field_works_as_it_is(started: Started) -> None:
    serve(
        "Qwen/Qwen3-0.6B --max-model-len 8192 --max-num-batched-tokens 2048 --max-num-seqs 128 "
        "--enable-prefix-caching --tensor-parallel-size 1 --served-model-name qwen "
        "--reasoning-parser qwen3 --gpu-memory-utilization 0.9 --port 8123 --host 0.0.0.0 "
        "--dtype half --quantization none"
    )
    assert changes(started.config) == {
        "model.source": "Qwen/Qwen3-0.6B",
        "model.context_tokens": 8192,
        "model.served_name": "qwen",
        "model.dtype": "float16",
        "model.quantization": "none",
        "prefill.chunk_tokens": 2048,
        "decode.chunk_tokens": 2048,
        "decode.running_max": 128,
        "gateway.reasoning_parser": "qwen3",
        "gateway.host": "0.0.0.0",
        "gateway.http_port": 8123,
    }
    assert [note.partition(":")[0] for note in started.notes] == [
        "--enable-prefix-caching",
        "--gpu-memory-utilization",
    ]


def test_our_own_flags_say_what_they_said(started: Started) -> None:
    serve("m.gguf --dtype float32 --prefill 2 --http-port 1 --no-first-chat --set decode.nice=3")
    assert changes(started.config) == {
        "model.source": "m.gguf",
        "model.dtype": "float32",
        "prefill.replicas": 2,
        "gateway.http_port": 1,
        "decode.nice": 3,
    }
    assert started.notes == ()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--model m --revision r", {"model.source": "m", "model.revision": "r"}),
        ("--max-model-len=4k", {"model.context_tokens": 4000}),
        ("--max_model_len 4K", {"model.context_tokens": 4096}),
        ("--max-model-len 1.5k", {"model.context_tokens": 1500}),
        ("--max-model-len auto", {}),
        ("--max-model-len -1", {}),
        (
            "--max-num-batched-tokens 64",
            {
                "prefill.chunk_tokens": 64,
                "decode.chunk_tokens": 64,
                "decode.mixed_chunk_tokens": 64,
            },
        ),
        ("--max-num-seqs 3", {"decode.running_max": 3}),
        ("--block-size 32", {"model.block_tokens": 32}),
        (
            "--kv-cache-memory-bytes 1G",
            {"prefill.pool_bytes": 1 << 30, "decode.pool_bytes": 1 << 30},
        ),
        (
            "--num-gpu-blocks-override 99",
            {"prefill.pool_blocks": 99, "decode.pool_blocks": 99},
        ),
        ("--dtype float", {"model.dtype": "float32"}),
        ("-q int8", {"model.quantization": "int8"}),
        ("--quantization gguf", {"model.stored_as": "gguf"}),
        ("--quantization awq", {"model.stored_as": "awq"}),
        ("-q gptq_marlin", {"model.stored_as": "gptq"}),
        ("-q compressed-tensors", {"model.stored_as": "compressed-tensors"}),
        ("--device cpu", {"model.device": "cpu"}),
        ("--enforce-eager", {"model.cuda_graphs": "off"}),
        ("--no-enforce-eager", {}),
        ("--async-scheduling", {"decode.step_ahead": True}),
        ("--kv-cache-dtype int8", {"model.kv_dtype": "int8"}),
        ("--kv-cache-dtype fp8_e4m3", {"model.kv_dtype": "fp8"}),
        ("--reasoning-parser deepseek_r1", {"gateway.reasoning_parser": "deepseek_r1"}),
        ("--scheduling-policy fcfs", {"router.policy": "fcfs"}),
        ("--no-enable-prefix-caching", {"store.offload": False}),
        (
            "--enable-lora --lora-modules a=/x b=/y --max-loras 1 --max-lora-rank 32",
            {"model.adapters": {"a": "/x", "b": "/y"}, "model.adapter_rank_max": 32},
        ),
        (
            '--lora-modules {"name":"a","path":"/x","base_model_name":"m"} b=/y',
            {"model.adapters": {"a": "/x", "b": "/y"}},
        ),
        ("-tp 2", {"prefill.tensor_parallel": 2, "decode.tensor_parallel": 2}),
        ("-tp 1 -pp 1 -dp 1 --cpu-offload-gb 0 --kv-cache-dtype auto --load-format auto", {}),
        ("--served-model-name a.b", {"model.served_name": "a.b"}),
        ('--pooler-config {"pooling_type":"MEAN"}', {"gateway.pooling": "mean"}),
        ('--override-pooler-config {"pooling_type":"LAST"}', {}),
        (
            '--speculative-config {"method":"ngram","num_speculative_tokens":6}',
            {"decode.speculation": "prompt_lookup", "decode.draft_tokens_max": 6},
        ),
        (
            '--speculative-config {"model":"org/small","num_speculative_tokens":3}',
            {
                "decode.speculation": "draft_model",
                "decode.draft_model": "org/small",
                "decode.draft_tokens_max": 3,
            },
        ),
    ],
)
def test_what_a_flag_sets(started: Started, line: str, expected: dict[str, Any]) -> None:
    serve(line)
    assert changes(started.config) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["--swap-space", "4"],
        ["--max-seq-len-to-capture", "8192"],
        ["--compilation-config", '{"level": 3}'],
        ["--trust-remote-code"],
        ["--disable-log-requests"],
        ["--seed", "0"],
        ["--max-logprobs", "20"],
        ["--enable-chunked-prefill"],
        ["--gpu-memory-utilization", "0.9"],
        ["--enable-lora"],
        ["--max-loras", "4"],
        ["--max-cpu-loras", "4"],
    ],
)
def test_what_changes_nothing_is_said_in_one_line(words: list[str]) -> None:
    translated = translate(["m", *words, "--port", "1"])
    assert translated.words == ("m", "--port", "1")
    (note,) = translated.notes
    assert note.startswith(f"{words[0]}: no effect here; ")
    assert "\n" not in note


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("--tensor-parallel-size 0", "--tensor-parallel-size is '0', must be at least 1"),
        ("-pp=8", "--pipeline-parallel-size is 8, can only be 1 here; for more"),
        ("--quantization hqq", "--quantization is hqq, can be auto, none, file, int8, int4, fp8"),
        ("-q hqq", "what the model's files are, gguf, awq, gptq, fp8, compressed-tensors"),
        ("--dtype fp8", "--dtype is fp8, can be auto, float32"),
        ("--kv-cache-dtype fp8_e5m2", "--kv-cache-dtype is fp8_e5m2, can be auto, int8, fp8"),
        ("--reasoning-parser granite", "--reasoning-parser is granite, can be deepseek_r1, qwen3"),
        ("--scheduling-policy priority", "send service_tier with the requests"),
        ("--generation-config auto", "--generation-config is auto, can only be vllm here; send"),
        ("--max-logprobs 50", "--max-logprobs is 50, can be at most 20"),
        ("--max-logprobs -1", "--max-logprobs is -1, can be at most 20"),
        ("--served-model-name a b", "--served-model-name is a b, but a model has one name"),
        ("--max-model-len x", "--max-model-len is 'x', must be a positive whole number"),
        ("--max-model-len 1.5K", "--max-model-len is '1.5K', must be a positive whole number"),
        ("--max-num-seqs 0", "--max-num-seqs is '0', must be at least 1"),
        ("--max-num-seqs --port 1", "--max-num-seqs needs a value"),
        ("--enforce-eager=1", "--enforce-eager takes no value"),
        ('--pooler-config {"pooling_type":"CLS"}', '--pooler-config is another than {"pooling_'),
        ("--pooler-config mean", '--pooler-config is another than {"pooling_type": "LAST"}'),
        ("--speculative-config 4", "--speculative-config is '4', must be JSON such as"),
        ('--speculative-config {"method":"eagle"}', "has method eagle, can only be ngram or"),
        (
            '--speculative-config {"method":"draft_model"}',
            'has method draft_model and no "model", which is the draft model',
        ),
        ("--speculative-config {}", "has method None, can only be ngram or draft_model"),
        ("--lora-modules a", "--lora-modules is 'a', must be name=path, or"),
        ("--lora-modules =b", "--lora-modules is '=b', must be name=path, or"),
        ('--lora-modules {"name":"a"}', "must be name=path, or"),
        ('--lora-modules {"name":"a","path":3}', "must be name=path, or"),
        ("--lora-modules", "--lora-modules needs a value"),
        ("--lora-dtype float16", "--lora-dtype is float16, can only be auto here; an adapter is"),
        ("--max-num-sequences 3", "is no flag of pdserve serve; did you mean '--max-num-seqs'?"),
        ("--prefil 3", "--prefil is no flag of pdserve serve; did you mean '--prefill'?"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    started: Started, line: str, problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        serve(f"m {line}")
    assert problem in str(caught.value)
    assert not hasattr(started, "config")


def test_a_key_is_not_repeated() -> None:
    with pytest.raises(ConfigError, match="--api-key is not supported") as caught:
        translate(["--api-key", "s3cret"])
    assert "s3cret" not in str(caught.value)


def test_words_after_two_dashes_are_not_looked_at() -> None:
    words = ("--", "--enforce-eager")
    assert translate(words) == replace(translate(()), words=words)


def test_the_help_shows_our_own_flags_alone() -> None:
    shown = CliRunner().invoke(cli.app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    assert "--quantization" in shown
    assert "--swap-space" not in shown


def test_every_flag_is_in_the_docs() -> None:
    documented = DOCS.read_text()
    assert [name for name in FLAGS if f"`{name}" not in documented] == []
