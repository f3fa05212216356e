"""Greedy tokens and logits equal those of ``transformers``, in float32, for every family."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pdserve.model.runner import ModelRunner, Run
from tests.models.small import Family, write_small_model
from tests.unit.model.conftest import RunnerOf

FloatArray = np.ndarray[Any, np.dtype[np.float32]]

PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 238, 462, 64, 338, 327, 9, 50, 288, 419, 7, 169, 399]
NEW_TOKENS = 16
LLAMA3 = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
YARN = {
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama, tied": {"family": "llama", "tied": True},
    "llama, rope llama3": {"family": "llama", "config": LLAMA3},
    "llama, rope linear": {"family": "llama", "config": LINEAR},
    "llama, rope yarn": {"family": "llama", "config": YARN},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "config": {"head_dim": 32}},
}


def reference_logits(directory: Path, tokens: list[int]) -> torch.Tensor:
    """[N, V] of every position."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]  # type: ignore[no-any-return]


def our_greedy(runner: ModelRunner) -> tuple[list[int], torch.Tensor]:
    """Prompt and generated tokens, and the logits of the positions that chose the latter."""
    blocks = list(range(runner.pool.block_count))
    tokens = list(PROMPT)
    rows: list[torch.Tensor] = []
    for _ in range(NEW_TOKENS):
        start = len(tokens) - 1 if rows else 0
        rows.append(runner.step([Run(tokens[start:], start, blocks)])[0])
        tokens.append(int(rows[-1].argmax()))
    return tokens, torch.stack(rows)


def assert_equal_to_reference(runner: ModelRunner, directory: Path) -> None:
    tokens, ours = our_greedy(runner)
    theirs = reference_logits(directory, tokens[:-1])[len(PROMPT) - 1 :]
    assert theirs.argmax(-1).tolist() == tokens[len(PROMPT) :]
    # Sums of some hundred float32 terms in another order: 1e-5 of the largest logit is generous.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
@pytest.mark.parametrize("model", MODELS)
def test_safetensors_models_answer_as_the_reference(
    tmp_path: Path, runner_of: RunnerOf, model: str, kernels: str
) -> None:
    directory = write_small_model(tmp_path, **MODELS[model])
    assert_equal_to_reference(runner_of(directory, kernels=kernels), directory)


def test_weights_in_several_files_are_found_through_the_index(
    tmp_path: Path, runner_of: RunnerOf
) -> None:
    from transformers import AutoModelForCausalLM

    whole = write_small_model(tmp_path / "whole")
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2

    tokens, logits_NV = our_greedy(runner_of(sharded))

    expected_tokens, expected_NV = our_greedy(runner_of(whole))
    assert tokens == expected_tokens
    assert torch.equal(logits_NV, expected_NV)


def test_files_saved_by_transformers_are_read(tmp_path: Path, runner_of: RunnerOf) -> None:
    from transformers import AutoModelForCausalLM

    ours = write_small_model(tmp_path / "ours", family="qwen2", config=LLAMA3)
    theirs = tmp_path / "theirs"
    AutoModelForCausalLM.from_pretrained(ours).save_pretrained(theirs)

    assert torch.equal(our_greedy(runner_of(theirs))[1], our_greedy(runner_of(ours))[1])


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GGUF_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    if name in GGUF_TOP:
        return GGUF_TOP[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{GGUF_NAMES[module]}.{kind}"


def pairs_side_by_side(weight: FloatArray, heads: int) -> FloatArray:
    """What converters do to q and k of the architecture "llama"."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    directory: Path, path: Path, kind: gguf.GGMLQuantizationType, family: Family
) -> dict[str, torch.Tensor]:
    """The model of ``directory`` as GGUF, matrices in ``kind``; the weights that a reader gets."""
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_token_list([f"<{index}>" for index in range(config["vocab_size"])])
    stored = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        values, turned = tensor.numpy(), "q_proj" in name or "k_proj" in name
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        if turned and family == "llama":
            values = pairs_side_by_side(values, heads)
        tensor_kind = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(values, tensor_kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=tensor_kind)
        values = gguf.dequantize(data, tensor_kind).reshape(tensor.shape)
        if turned and family == "llama":
            shape = (heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
            values = values.reshape(shape).swapaxes(1, 2).reshape(values.shape)
        stored[name] = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_answers_as_the_reference(
    tmp_path: Path, runner_of: RunnerOf, family: Family
) -> None:
    directory = write_small_model(tmp_path / "plain", family=family)
    path = tmp_path / "small.gguf"
    write_gguf(directory, path, gguf.GGMLQuantizationType.F32, family)
    assert_equal_to_reference(runner_of(path), directory)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16"])
def test_quantised_gguf_weights_are_those_of_the_format(
    tmp_path: Path, runner_of: RunnerOf, kind: str
) -> None:
    directory = write_small_model(tmp_path / "plain")
    path = tmp_path / "small.gguf"
    stored = write_gguf(directory, path, gguf.GGMLQuantizationType[kind], "llama")
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})

    assert torch.equal(our_greedy(runner_of(path))[1], our_greedy(runner_of(directory))[1])
