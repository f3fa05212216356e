"""Our tokenizers beside those of ``transformers``, which the package itself never imports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from pdserve.text.chat import chat_template_of
from pdserve.text.gguf_metadata import read_metadata
from pdserve.text.tokenizer import Tokenizer, load_tokenizer
from tests.unit.text.support import MERGES, byte_level, write_gguf

NASTY = [
    "",
    " ",
    "hello",
    " hello  world   three",
    "\n\n\tdef f(x):\n        return x ** 2  # two\r\n\r\n",
    "It's we'll I'D they've 'tis",
    "12345 3.14159 1,000,000 2024-02-29 x1y22",
    "naïve café Ångström e\u0301",
    "你好，世界。こんにちは 안녕하세요",
    "Привет мир עולם مرحبا",
    "😀👍🏽🇺🇸❤️👨‍👩‍👧‍👦 a😀b",
    "zero\u200bwidth\u00a0space\u3000wide \u2028line",
    "!!! ??? ... --- === <> {}[]()",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>",
    "text<|endoftext|> <|im_end|><|im_end|>x <|im_",
    "a" * 300 + " " * 70 + "b\n" * 20,
    "https://example.org/?q=a%20b&c=d#e \\n \\u00e9 \x7f",
    "tab\there trailing   ",
]
APART = ["a  2", "x = 12\n\n  3", "  \n 5 a", "1   22    333", "½ ² Ⅷ ٣ 四"]
"""Where GPT-2's splitting alone gives other tokens than with single digits before it."""


@pytest.fixture(scope="module")
def reference(default_gguf: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(
        default_gguf.parent, gguf_file=default_gguf.name
    )


@pytest.mark.parametrize("text", NASTY)
def test_the_default_model_encodes_and_decodes_as_the_reference(
    smollm: Tokenizer, reference: Any, text: str
) -> None:
    tokens = smollm.encode(text)
    assert tokens == reference.encode(text, add_special_tokens=False)
    assert smollm.encode(text, add_special_tokens=True) == reference.encode(text)
    for skip in (True, False):
        assert smollm.decode(tokens, skip_special_tokens=skip) == reference.decode(
            tokens, skip_special_tokens=skip
        )


@pytest.mark.parametrize("text", APART)
def test_digits_stand_alone_as_in_the_published_tokenizer(
    smollm: Tokenizer, reference: Any, text: str
) -> None:
    """Goal: the file says ``smollm``, and that is digits first, then GPT-2's splitting.

    ``transformers`` ignores the name when it reads GGUF: the reference is put right by hand.
    """
    wrong = reference.backend_tokenizer.pre_tokenizer
    assert smollm.encode(text) != reference.encode(text)
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), wrong]
    )
    try:
        assert smollm.encode(text) == reference.encode(text)
    finally:
        reference.backend_tokenizer.pre_tokenizer = wrong


def test_the_default_models_template_renders_as_the_reference(
    smollm: Tokenizer, reference: Any
) -> None:
    messages = [
        {"role": "system", "content": "Be  brief.\n"},
        {"role": "user", "content": "<b>'é'</b> {{ 1 }}"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]
    for part in (messages, messages[1:]):
        expected = reference.apply_chat_template(part, tokenize=False, add_generation_prompt=True)
        assert chat_template_of(smollm).render(part) == expected


def _qwen2_pattern() -> str:
    from transformers.models.qwen2 import tokenization_qwen2

    return str(tokenization_qwen2.PRETOKENIZE_REGEX)


def _llama3_pattern() -> str:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter: Any = TikTokenConverter
    return str(converter().pattern)


@pytest.mark.parametrize(
    ("pre", "pattern_of"), [("qwen2", _qwen2_pattern), ("llama-bpe", _llama3_pattern)]
)
def test_words_are_split_as_the_reference_splits_them(
    tmp_path: Path, pre: str, pattern_of: Callable[[], str]
) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", byte_level(pre)))
    expected = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern_of()), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for text in NASTY + APART:
        ours = tokenizer.hf.pre_tokenizer.pre_tokenize_str(text)
        assert ours == expected.pre_tokenize_str(text)


def test_qwen2_encodes_as_the_reference(tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    path = write_gguf(tmp_path / "a.gguf", byte_level("qwen2"))
    vocabulary = {
        token: index for index, token in enumerate(read_metadata(path)["tokenizer.ggml.tokens"])
    }
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    reference_class: Any = Qwen2Tokenizer  # it says that merges are texts, and takes pairs
    reference = reference_class(vocab=vocabulary, merges=merges)
    ours = load_tokenizer(path)
    for text in NASTY:
        if "<|" not in text:  # the two know different special tokens
            assert ours.encode(text) == reference.encode(text, add_special_tokens=False)
