"""What a step refuses, what weights refuse, and what loading makes of the settings."""

import dataclasses
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdserve.config import ModelConfig
from pdserve.errors import ConfigError
from pdserve.kvstore.keys import MUST_MATCH
from pdserve.model import load
from pdserve.model.cpu_ops import cpu_ops
from pdserve.model.families.registry import read_architecture
from pdserve.model.layers import event_after
from pdserve.model.load import kv_identity, load_runner
from pdserve.model.ops import LayersTold
from pdserve.model.runner import ModelRunner, Run
from pdserve.model.source import ModelFiles
from tests.models.small import write_small_model
from tests.unit.model.conftest import RunnerOf


@pytest.fixture
def runner(tmp_path: Path, runner_of: RunnerOf) -> ModelRunner:
    return runner_of(write_small_model(tmp_path, layers=1, context_tokens=64), block_count=8)


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ([], "at least one run"),
        ([Run([], 0, [0])], "positions 0 to 0"),
        ([Run([1], -1, [0])], "positions -1 to 0"),
        ([Run([1], 64, [0, 1, 2, 3, 4])], "positions 64 to 65"),
        ([Run([1] * 17, 0, [0])], "has 1 blocks of 16"),
        ([Run([1], 0, [8])], "not all in 0..8"),
        ([Run([1], 0, [-1])], "not all in 0..8"),
        ([Run([1, 2], 0, [0], draft_count=2)], "2 of a run's 2 tokens are drafts"),
        ([Run([1, 2], 0, [0], draft_count=-1)], "-1 of a run's 2 tokens are drafts"),
        ([Run([512], 0, [0])], "outside 0..512"),
        ([Run([1], 0, [0]), Run([-1], 0, [1])], "outside 0..512"),
    ],
)
def test_a_step_refuses_what_it_could_not_compute_and_writes_nothing(
    runner: ModelRunner, runs: list[Run], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        runner.step(runs)
    assert not runner.pool.tensor.any()


def test_the_last_position_of_the_context_can_be_used(runner: ModelRunner) -> None:
    assert runner.step([Run([1] * 64, 0, [0, 1, 2, 3])]).shape == (1, 512)


def test_a_step_in_which_nobody_wants_logits_still_writes_its_keys(runner: ModelRunner) -> None:
    assert runner.step([Run([1, 2], 0, [3], wants_logits=False)]).shape == (0, 512)
    assert runner.pool.tensor[3, 0, :, :, :2].any()


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drafts_get_the_logits_that_each_gets_alone_beside_other_runs(
    tmp_path: Path, runner_of: RunnerOf, kernels: str, dtype: torch.dtype
) -> None:
    runner = runner_of(write_small_model(tmp_path), kernels=kernels, dtype=dtype)
    text = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8]
    one_by_one = [runner.step([Run([t], at, [0, 1])])[0] for at, t in enumerate(text)]
    runner.step([Run(text[:13], 0, [2, 3], wants_logits=False)])
    rows = runner.step(
        [
            Run(text[:7], 0, [4, 5]),
            Run(text[13:18], 13, [2, 3], draft_count=4),
            Run(text[:3], 0, [6], wants_logits=False),
            Run(text, 0, [8, 9], draft_count=1),
        ]
    )
    wanted = [one_by_one[index] for index in (6, 13, 14, 15, 16, 17, 17, 18)]
    assert torch.equal(rows, torch.stack(wanted))


def changed_weights(directory: Path, change: dict[str, torch.Tensor | None]) -> Path:
    path = write_small_model(directory, layers=1) / "model.safetensors"
    state: dict[str, Any] = load_file(path) | change
    save_file({name: value for name, value in state.items() if value is not None}, path)
    return directory


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model.norm.weight": None}, "lack model.norm.weight"),
        ({"model.norm.weight": torch.ones(3)}, r"shape \(3,\), the architecture says \(64,\)"),
        ({"model.extra.weight": torch.ones(3)}, "model.extra.weight among them"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, "only some of"),
    ],
)
def test_weights_that_do_not_fit_the_architecture_are_refused(
    tmp_path: Path, runner_of: RunnerOf, change: dict[str, torch.Tensor | None], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        runner_of(changed_weights(tmp_path, change))


def test_a_family_with_biases_must_bring_them(tmp_path: Path, runner_of: RunnerOf) -> None:
    path = write_small_model(tmp_path, family="qwen2", layers=1) / "model.safetensors"
    state = load_file(path)
    save_file({name: value for name, value in state.items() if "bias" not in name}, path)
    with pytest.raises(ConfigError, match=r"lack model.layers.0.self_attn.q_proj.bias"):
        runner_of(tmp_path)


def test_an_offset_is_added_to_a_norm_before_anything_is_rounded(
    tmp_path: Path, runner_of: RunnerOf
) -> None:
    """A bit more than half a step of bfloat16 above 1; rounded first, it would come to 1."""
    path = write_small_model(tmp_path, family="gemma3", layers=1) / "model.safetensors"
    save_file(load_file(path) | {"model.norm.weight": torch.full((64,), 2**-8 + 2**-17)}, path)
    runner = runner_of(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(runner.weights.norm_C, torch.full((64,), 1 + 2**-7, dtype=torch.bfloat16))


def test_a_layer_of_experts_must_bring_all_of_them(tmp_path: Path, runner_of: RunnerOf) -> None:
    path = write_small_model(tmp_path, family="qwen3_moe", layers=1) / "model.safetensors"
    state = load_file(path)
    del state["model.layers.0.mlp.experts.7.up_proj.weight"]
    save_file(state, path)
    with pytest.raises(ConfigError, match=r"lack model.layers.0.mlp.experts.7.up_proj.weight"):
        runner_of(tmp_path)


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path, runner_of: RunnerOf) -> None:
    path = write_small_model(tmp_path, layers=1) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="download it again"):
        runner_of(tmp_path)


def test_what_old_checkpoints_carry_beside_the_weights_is_passed_over(
    tmp_path: Path, runner_of: RunnerOf
) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    runner = runner_of(changed_weights(tmp_path, {name: torch.ones(8)}))
    assert runner.step([Run([1], 0, [0])]).shape == (1, 512)


def config_of(directory: Path, **fields: Any) -> ModelConfig:
    return ModelConfig(source=str(write_small_model(directory, layers=1)), device="cpu", **fields)


def test_loading_fills_the_bytes_it_may_take(tmp_path: Path) -> None:
    config = config_of(tmp_path, context_tokens=100)
    # a block: 1 layer, keys and values, 2 heads, 16 tokens, 16 channels, 2 bytes
    runner = load_runner(config, block_count=None, pool_bytes=10 * 2048 + 1, threads=1)
    assert runner.pool.block_count == 10
    assert runner.pool.tensor.dtype == torch.bfloat16
    assert runner.architecture.context_tokens == 100
    assert torch.get_num_threads() == 1


def test_a_count_of_blocks_wins_over_bytes(tmp_path: Path) -> None:
    runner = load_runner(
        config_of(tmp_path, dtype="float32"), block_count=3, pool_bytes=0, threads=1
    )
    assert runner.pool.block_count == 3
    assert runner.pool.tensor.dtype == torch.float32


def test_a_pool_too_small_for_two_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a block of this model has 2048; at least 2"):
        load_runner(config_of(tmp_path), block_count=None, pool_bytes=4095)


def test_triton_on_a_cpu_needs_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        load_runner(config_of(tmp_path, kernels="triton"), block_count=2, pool_bytes=0)


def test_a_missing_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        load.device_of(ModelConfig(device="cuda"))


def test_blocks_agree_on_everything_that_changes_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_small_model(tmp_path / "one", layers=1)
    files = ModelFiles("small", "safetensors", directory)
    architecture = read_architecture(files)
    plain = kv_identity(files, architecture, ModelConfig(device="cpu"))
    others = [
        kv_identity(files, architecture, ModelConfig(device="cpu", dtype="float32")),
        kv_identity(files, architecture, ModelConfig(device="cpu", block_tokens=32)),
        kv_identity(files, architecture, ModelConfig(device="cpu", quantization="int4")),
        kv_identity(files, architecture, ModelConfig(device="cpu", quantization="int8")),
        kv_identity(files, architecture, ModelConfig(device="cpu"), parts=2),
        kv_identity(files, architecture, ModelConfig(device="cpu"), store_codec="int8"),
        kv_identity(files, architecture, ModelConfig(device="cpu", kv_dtype="int8")),
        kv_identity(files, architecture, ModelConfig(device="cpu", kv_dtype="fp8")),
        *(
            kv_identity(files, replace(architecture, **change), ModelConfig(device="cpu"))
            for change in (
                {"layers": architecture.layers * 2},
                {"kv_head_count": 1},
                {"head_dim": 2 * architecture.head_dim},
                {"layers": (replace(architecture.layers[0], window=8),)},
            )
        ),
    ]
    assert plain.keys() == MUST_MATCH
    for same in ("none", "file"):  # the same bits
        same_weights = ModelConfig(device="cpu", quantization=same)
        assert kv_identity(files, architecture, same_weights) == plain
    other = ModelFiles(
        "small", "safetensors", write_small_model(tmp_path / "two", layers=1, seed=1)
    )
    others.append(kv_identity(other, architecture, ModelConfig(device="cpu")))
    elsewhere = SimpleNamespace(name=cpu_ops().name, multiplies="as another CPU does")
    with monkeypatch.context() as patch:
        patch.setattr(load, "cpu_ops", lambda: elsewhere)
        others.append(kv_identity(files, architecture, ModelConfig(device="cpu")))
    assert all(plain != identity for identity in others)
    in_8_bits = [each["kv_dtype"] for each in others if each["kv_dtype"] != "dtype"]
    assert len(in_8_bits) == len(set(in_8_bits)) == 3  # of the same size, or nearly
    shorter = ModelConfig(device="cpu", context_tokens=100, served_name="other")
    assert kv_identity(files, architecture, shorter) == plain


def test_blocks_tell_apart_what_config_json_makes_of_the_same_tensors(tmp_path: Path) -> None:
    identities = []
    for version in ("gptq", "gptq_v2"):
        fields = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": version}
        directory = write_small_model(
            tmp_path / "small", layers=1, config={"quantization_config": fields}
        )
        files = ModelFiles("small", "safetensors", directory)
        architecture = read_architecture(files)
        identities.append(kv_identity(files, architecture, ModelConfig(device="cpu")))
    assert identities[0] != identities[1]


def test_8_bits_have_room_for_nearly_twice_as_many_blocks(tmp_path: Path) -> None:
    directory = write_small_model(tmp_path, hidden=128, heads=2, kv_heads=1)
    config = ModelConfig(source=str(directory), device="cpu")
    plain, coded = (
        load_runner(each, block_count=None, pool_bytes=1 << 20, threads=1)
        for each in (config, dataclasses.replace(config, kv_dtype="int8"))
    )
    assert coded.pool.tensor.dtype == torch.int8
    # A row of 64 channels has 128 bytes in bfloat16, 64 and a scale of 2 in 8 bits.
    assert coded.pool.block_bytes * 128 == plain.pool.block_bytes * 66
    assert coded.pool.block_count == plain.pool.block_count * 128 // 66


def test_fp8_on_a_cpu_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(config_of(tmp_path), kv_dtype="fp8")
    with pytest.raises(ConfigError, match=r"model.kv_dtype is fp8, .* take int8"):
        load_runner(config, block_count=2, pool_bytes=0, threads=1)


def test_loading_says_nothing_when_all_is_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_runner(config_of(tmp_path), block_count=2, pool_bytes=0, threads=1)
    assert not caplog.records


# ── who hears of layers ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # all layers in C++, or not
@pytest.mark.parametrize(("every", "counts"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_layers_are_told_of_when_they_are_in_the_pool(
    tmp_path: Path, runner_of: RunnerOf, dtype: torch.dtype, every: int, counts: list[int]
) -> None:
    directory = write_small_model(tmp_path, layers=5)
    runner = runner_of(directory, dtype=dtype, block_count=4)
    heard: list[tuple[int, torch.Tensor]] = []

    def tell(count: int, done: object) -> None:
        assert done is None
        heard.append((count, runner.pool.tensor[:2].clone()))

    run = Run(range(20), 0, [0, 1])
    logits = runner.step([run], None, LayersTold(every, tell))
    assert [count for count, _ in heard] == counts
    for count, seen in heard:
        assert torch.equal(seen[:, :count], runner.pool.tensor[:2, :count])
        assert not torch.equal(seen, runner.pool.tensor[:2]) or count == 5
    assert torch.equal(logits, runner.step([run])), "who listens changes nothing"


def test_an_error_of_who_hears_is_the_step_s(tmp_path: Path, runner_of: RunnerOf) -> None:
    runner = runner_of(write_small_model(tmp_path, layers=1), dtype=torch.bfloat16)

    def tell(count: int, done: object) -> None:
        raise RuntimeError("nobody listens")

    with pytest.raises(RuntimeError, match="nobody listens"):
        runner.step([Run([1], 0, [0])], None, LayersTold(1, tell))


def test_on_a_gpu_an_event_says_when_layers_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=recorded.append))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the steps of {device}")
    assert event_after(torch.zeros(1)) is None
    on_gpu: Any = SimpleNamespace(is_cuda=True, device="cuda:0")
    assert event_after(on_gpu) is not None
    assert recorded == ["the steps of cuda:0"]
