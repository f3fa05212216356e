"""The real SmolLM2 weights answer token for token as ``transformers`` does, in float32.

The reference gets the weights dequantised by ``gguf`` and turned by its own converter's rule, not
by our loader. It chooses 64 tokens greedily; ours are then checked against its logits of the whole
text in one pass, which is the same comparison at a fraction of the time.
"""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from pdserve.config import ModelConfig
from pdserve.model.load import load_runner
from pdserve.model.runner import ModelRunner, Run

NEW_TOKENS = 64
PROMPT_LENGTHS = [1, 12, 130, 700]
MORE_LENGTHS = [2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 100, 255, 400, 512, 1000, 1500]
BLOCKS = list(range(100))


@pytest.fixture(scope="module")
def runner(default_model: Path) -> ModelRunner:
    config = ModelConfig(source=str(default_model), dtype="float32", device="cpu", kernels="cpu")
    # One thread: two on a machine with other work wait for each other longer than they compute.
    return load_runner(config, block_count=len(BLOCKS), pool_bytes=0, threads=1)


@pytest.fixture(scope="module")
def reference(default_model: Path) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_theta=100_000.0,
            tie_word_embeddings=True,
        )
    )
    state = model.state_dict()
    for tensor in gguf.GGUFReader(default_model).tensors:
        name, heads = hugging_face_name(tensor.name)
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if heads:
            pairs = values.reshape(heads, 32, 2, 576)
            values = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(-1, 576)
        state.pop(name).copy_(torch.from_numpy(np.array(values)))
    assert state.keys() <= {"lm_head.weight"}  # tied
    return model.eval()


def hugging_face_name(name: str) -> tuple[str, int]:
    """The reference's name of a tensor, and its heads where rows are stored as rotary pairs."""
    top = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if name in top:
        return top[name], 0
    _, layer, part, _ = name.split(".")
    module = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }.get(part, f"self_attn.{part.removeprefix('attn_')}_proj")
    return f"model.layers.{layer}.{module}.weight", {"attn_q": 9, "attn_k": 3}.get(part, 0)


def prompt_of(length: int) -> list[int]:
    """Words of a few kinds in a fixed disorder; token 0 first, as texts of this model have it not."""
    return [(504 + index * index * 31 + index * 7) % 40_000 + 100 for index in range(length)]


def greedy(runner: ModelRunner, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """The prompt in chunks of 256, then token by token."""
    for start in range(0, len(prompt), 256):
        row = runner.step([Run(prompt[start : start + 256], start, BLOCKS)])[0]
    tokens, rows = list(prompt), [row]
    for _ in range(NEW_TOKENS - 1):
        tokens.append(int(rows[-1].argmax()))
        rows.append(runner.step([Run(tokens[-1:], len(tokens) - 1, BLOCKS)])[0])
    return [*tokens, int(rows[-1].argmax())], torch.stack(rows)


@pytest.mark.parametrize(
    "length",
    [*PROMPT_LENGTHS, *(pytest.param(more, marks=pytest.mark.slow) for more in MORE_LENGTHS)],
)
def test_64_greedy_tokens_are_those_of_the_reference(
    runner: ModelRunner, reference: torch.nn.Module, length: int
) -> None:
    tokens, ours = greedy(runner, prompt_of(length))
    with torch.inference_mode():
        theirs = reference(torch.tensor([tokens[:-1]])).logits[0, length - 1 :]
    assert theirs.argmax(-1).tolist() == tokens[length:]
    # 30 layers of float32 sums in another order, on logits of up to about 40.
    assert float((ours - theirs).abs().max()) < 2e-3
