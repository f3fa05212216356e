"""The weights of a Llama-family GGUF file as a Hugging Face directory, in bfloat16.

    gguf_to_hf.py FILE.gguf DIRECTORY

So that a peer which reads no GGUF serves exactly the numbers that we serve. GGUF keeps the rows of
q and k in the order of interleaved rotary pairs; Hugging Face wants first all first halves of the
pairs, then all second ones.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

OF_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OF_THE_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def halves_from_pairs(weight_RC: np.ndarray, head_count: int) -> np.ndarray:
    """Rows of each head from p0a p0b p1a p1b … to p0a p1a … p0b p1b …"""
    R, C = weight_RC.shape
    pairs = weight_RC.reshape(head_count, R // head_count // 2, 2, C)
    return pairs.swapaxes(1, 2).reshape(R, C)


class Source:
    """A GGUF file of a Llama-family model."""

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path)
        if self.field("general.architecture") != "llama":
            sys.exit(f"{path} is a {self.field('general.architecture')}, not of the Llama family")

    def field(self, name: str) -> Any:
        return self._reader.fields[name].contents()

    def state(self) -> dict[str, torch.Tensor]:
        heads_of = {
            "attn_q": self.field("llama.attention.head_count"),
            "attn_k": self.field("llama.attention.head_count_kv"),
        }
        state = {}
        for tensor in self._reader.tensors:
            weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            name = OF_THE_MODEL.get(tensor.name)
            if name is None:
                _, layer, part, _ = tensor.name.split(".")
                name = f"model.layers.{layer}.{OF_A_LAYER[part]}.weight"
                if part in heads_of:
                    weight = halves_from_pairs(weight, heads_of[part])
            state[name] = torch.from_numpy(np.ascontiguousarray(weight)).to(torch.bfloat16)
        return state

    def config(self, *, tied: bool) -> LlamaConfig:
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
            vocab_size=self.field("llama.vocab_size"),
            hidden_size=self.field("llama.embedding_length"),
            intermediate_size=self.field("llama.feed_forward_length"),
            num_hidden_layers=self.field("llama.block_count"),
            num_attention_heads=self.field("llama.attention.head_count"),
            num_key_value_heads=self.field("llama.attention.head_count_kv"),
            max_position_embeddings=self.field("llama.context_length"),
            rms_norm_eps=self.field("llama.attention.layer_norm_rms_epsilon"),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": self.field("llama.rope.freq_base"),
            },
            tie_word_embeddings=tied,
            bos_token_id=self.field("tokenizer.ggml.bos_token_id"),
            eos_token_id=self.field("tokenizer.ggml.eos_token_id"),
        )


def main() -> None:
    path, directory = Path(sys.argv[1]), Path(sys.argv[2])
    source = Source(path)
    state = source.state()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    source.config(tied="lm_head.weight" not in state).save_pretrained(directory)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(directory)


if __name__ == "__main__":
    main()
