"""The tokenizer that a GGUF file describes in its metadata.

GGUF keeps the vocabulary but names the text splitting before it instead of describing it:

* ``tokenizer.ggml.model`` = ``gpt2``: byte-level BPE with the merges listed, and
  ``tokenizer.ggml.pre`` the name of the pre-tokeniser: ``_PRE_TOKENIZERS`` spells those out.
* ``tokenizer.ggml.model`` = ``llama``: sentencepiece BPE. No merges are listed; a piece's score is
  the rank of the merge that makes it, so every way to cut a piece into two known pieces is a
  merge, best score first.

A pre-tokeniser that is not in the table is refused: a wrong one gives slightly wrong token ids and
a model that is quietly worse. ``transformers`` takes the GPT-2 splitting for every such file,
which for ``smollm`` differs from the published tokenizer where several spaces stand before a digit.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as HfTokenizer

from pdserve.errors import ConfigError
from pdserve.text.gguf_metadata import read_metadata
from pdserve.text.tokenizer import SPACE_MARK, Tokenizer

_PREFIX = "tokenizer."


class TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def _split_words(digits: str) -> pre_tokenizers.PreTokenizer:
    """The splitting of Llama 3 and its relatives, which differ in how digits are grouped."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
        r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word, with at most one sign or space before it
        rf"|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # signs, with the line ends behind them
        r"|\s*[\r\n]+"
        r"|\s+(?!\S)"  # spaces, less the one that belongs to the next word
        r"|\s+"
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama3() -> pre_tokenizers.PreTokenizer:
    return _split_words(r"\p{N}{1,3}")


def _qwen2() -> pre_tokenizers.PreTokenizer:
    return _split_words(r"\p{N}")


_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_PRE_TOKENIZERS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    **dict.fromkeys(("default", "gpt-2"), _gpt2),
    **dict.fromkeys(("smollm", "starcoder"), _single_digits),
    **dict.fromkeys(_LLAMA3_NAMES, _llama3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _qwen2),
}


def tokenizer_of_gguf(path: Path) -> Tokenizer:
    """The tokenizer in ``path``, a GGUF file.

    Raises:
        ConfigError: the file is damaged, or describes a tokenizer of a kind not known here.
    """
    metadata = read_metadata(path, _PREFIX)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in builders:
        raise ConfigError(
            f"{path} has a tokenizer of kind {kind!r}, known here are {', '.join(builders)}; "
            "serve the model from a directory with tokenizer.json instead"
        )
    try:
        hf = builders[kind](metadata)
    except ConfigError:
        raise
    except Exception as error:  # a field is missing, or what the library raises: nothing precise
        raise ConfigError(
            f"{path} describes a tokenizer that cannot be built ({error!r}); convert the model "
            "again, or serve it from a directory with tokenizer.json"
        ) from error
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if bos is not None and _adds_bos(metadata):
        hf.post_processor = processors.TemplateProcessing(
            single="bos $A", special_tokens=[("bos", bos)]
        )
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return Tokenizer(
        hf,
        eos_token_ids=tuple(dict.fromkeys(token for token in ends if token is not None)),
        bos_token_id=bos,
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    by_default = (
        metadata["tokenizer.ggml.model"] == "llama"
        or metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    )
    return bool(metadata.get("tokenizer.ggml.add_bos_token", by_default))


def _byte_level(metadata: Mapping[str, Any]) -> HfTokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise ConfigError(
            f"the GGUF file wants the pre-tokeniser {name!r}, known here are "
            f"{', '.join(_PRE_TOKENIZERS)}; serve the model from a directory with tokenizer.json"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    # Llama 3's vocabulary holds words that its merges cannot reach; they are taken whole.
    whole_words = name in _LLAMA3_NAMES
    hf = HfTokenizer(models.BPE(_ids(tokens), merges, ignore_merges=whole_words))
    if name == "qwen2":
        hf.normalizer = normalizers.NFC()
    hf.pre_tokenizer = _PRE_TOKENIZERS[name]()
    hf.decoder = decoders.ByteLevel()
    _add_tokens(hf, tokens, metadata["tokenizer.ggml.token_type"])
    return hf


def _sentencepiece(metadata: Mapping[str, Any]) -> HfTokenizer:
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = _merges_by_score(tokens, metadata["tokenizer.ggml.scores"], types)
    hf = HfTokenizer(
        models.BPE(_ids(tokens), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", SPACE_MARK)
    steps = [
        decoders.Replace(SPACE_MARK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        hf.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        hf.normalizer = spaces
    hf.decoder = decoders.Sequence(steps)
    _add_tokens(hf, tokens, types)
    return hf


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _merges_by_score(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """All pairs of known pieces that make a known piece, the piece with the best score first.

    Several ways to make one piece stand beside each other, in order of their parts' ids, as in the
    published conversions of such models.
    """
    ids = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == TokenType.NORMAL
    }
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, index in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[index], ids[left], ids[right], (left, right)))
    ranked.sort()
    return [pair for *_, pair in ranked]


def _add_tokens(hf: HfTokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Tell the library which tokens stand for themselves wherever they are written out."""
    special = {TokenType.UNKNOWN, TokenType.CONTROL}
    for is_special, kinds in ((True, special), (False, {TokenType.USER_DEFINED})):
        hf.add_tokens(
            [
                AddedToken(token, normalized=False, special=is_special)
                for token, kind in zip(tokens, types, strict=True)
                if kind in kinds
            ]
        )
