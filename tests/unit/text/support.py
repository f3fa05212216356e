"""Small GGUF files with a tokenizer in them, written by the ``gguf`` package itself."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
from tokenizers.pre_tokenizers import ByteLevel

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "Ġ Ġ", "Ã ©")
EXTRAS = (("<|end|>", CONTROL), ("<|user|>", CONTROL), ("né é", USER_DEFINED))
BYTE_TOKENS = sorted(ByteLevel.alphabet())
END = len(BYTE_TOKENS) + len(MERGES)
USER = END + 1
USER_DEFINED_TOKEN = END + 2
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"

Edit = Callable[[gguf.GGUFWriter], Any]


def write_gguf(path: Path, *edits: Edit) -> Path:
    """A GGUF file without tensors, with the metadata that ``edits`` add."""
    writer = gguf.GGUFWriter(path, "llama")
    for edit in edits:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level(pre: str = "smollm", merges: Sequence[str] = MERGES) -> Edit:
    """256 bytes, what ``merges`` make of them, and ``EXTRAS``."""

    def edit(writer: gguf.GGUFWriter) -> None:
        tokens = [*BYTE_TOKENS, *(merge.replace(" ", "") for merge in merges)]
        types = [NORMAL] * len(tokens)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([*tokens, *(token for token, _ in EXTRAS)])
        writer.add_token_types([*types, *(kind for _, kind in EXTRAS)])
        writer.add_token_merges(list(merges))
        writer.add_eos_token_id(END)
        writer.add_bos_token_id(USER)
        writer.add_chat_template(TEMPLATE)

    return edit


def sentencepiece(pieces: Sequence[str]) -> Edit:
    """<unk>, <s>, </s>, the 256 bytes, then ``pieces``, the best first."""

    def edit(writer: gguf.GGUFWriter) -> None:
        heads = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
        all_bytes = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
        entries = [*heads, *all_bytes, *((piece, NORMAL) for piece in pieces)]
        writer.add_tokenizer_model("llama")
        writer.add_token_list([token for token, _ in entries])
        writer.add_token_types([kind for _, kind in entries])
        writer.add_token_scores([0.0] * 259 + [-float(rank) for rank in range(len(pieces))])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    return edit
