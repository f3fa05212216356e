import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models

from pdserve.errors import ConfigError
from pdserve.text.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from tests.unit.text.conftest import PIECES
from tests.unit.text.support import (
    END,
    TEMPLATE,
    USER,
    USER_DEFINED_TOKEN,
    byte_level,
    sentencepiece,
    write_gguf,
)


def test_the_metadata_become_attributes(small: Tokenizer) -> None:
    assert small.vocab_size == USER_DEFINED_TOKEN + 1
    assert small.eos_token_ids == (END,)
    assert small.bos_token_id == USER
    assert small.chat_template == TEMPLATE
    assert small.special_ids == {END, USER}


def test_special_tokens_in_text_become_themselves(small: Tokenizer) -> None:
    assert small.encode("<|user|>") == [USER]
    assert small.encode("hello<|end|>")[-1] == END
    assert small.encode("né é") == [USER_DEFINED_TOKEN]


def test_special_tokens_are_skipped_unless_asked_for(small: Tokenizer) -> None:
    tokens = [USER, *small.encode("hello"), USER_DEFINED_TOKEN, END]
    assert small.decode(tokens) == "helloné é"
    assert small.decode(tokens, skip_special_tokens=False) == "<|user|>helloné é<|end|>"


def test_ids_outside_of_the_vocabulary_have_no_text(small: Tokenizer) -> None:
    assert small.decode([small.vocab_size, 10**9, -1]) == ""
    assert small.token_bytes(small.vocab_size) == b""


def test_half_a_character_has_bytes_but_no_text(small: Tokenizer) -> None:
    first, *_ = small.encode("😀")
    assert small.token_bytes(first) == "😀".encode()[:1]
    assert small.token_text(first) == "\ufffd"


@given(text=st.text())
def test_text_survives_the_way_there_and_back(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text), skip_special_tokens=False) == text


@given(data=st.data())
def test_decode_agrees_with_the_library(small: Tokenizer, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, small.vocab_size - 1)))
    for skip in (True, False):
        expected = small.hf.decode(tokens, skip_special_tokens=skip)
        assert small.decode(tokens, skip_special_tokens=skip) == expected


def test_the_start_token_is_added_when_the_file_and_the_caller_say_so(tmp_path: Path) -> None:
    quiet = load_tokenizer(write_gguf(tmp_path / "a.gguf", byte_level()))
    eager = load_tokenizer(
        write_gguf(tmp_path / "b.gguf", byte_level(), lambda w: w.add_add_bos_token(True))
    )
    assert eager.encode("he", add_special_tokens=True) == [USER, *eager.encode("he")]
    assert quiet.encode("he", add_special_tokens=True) == quiet.encode("he")


# ── splitting before the merges ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "a  12", ["a", "ĠĠ", "1", "2"]),
        ("default", "a  12", ["a", "Ġ", "Ġ12"]),
        ("llama-bpe", "it'S 12345\n\n x", ["it", "'S", "Ġ", "123", "45", "ĊĊ", "Ġx"]),
        ("qwen2", "it'S 123\n\n x", ["it", "'S", "Ġ", "1", "2", "3", "ĊĊ", "Ġx"]),
    ],
)
def test_each_pre_tokeniser_splits_its_own_way(
    tmp_path: Path, pre: str, text: str, expected: list[str]
) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", byte_level(pre)))
    assert [word for word, _ in tokenizer.hf.pre_tokenizer.pre_tokenize_str(text)] == expected


def test_qwen2_composes_characters_first(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", byte_level("qwen2")))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


def test_an_unknown_pre_tokeniser_is_refused_with_a_way_out(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", byte_level("porridge"))
    with pytest.raises(ConfigError, match=r"'porridge'.*smollm.*tokenizer\.json"):
        load_tokenizer(path)


def test_an_unknown_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", lambda w: w.add_tokenizer_model("rwkv"))
    with pytest.raises(ConfigError, match="'rwkv'"):
        load_tokenizer(path)


def test_missing_and_contradicting_metadata_are_refused(tmp_path: Path) -> None:
    missing = write_gguf(tmp_path / "a.gguf", lambda w: w.add_tokenizer_model("gpt2"))
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.tokens"):
        load_tokenizer(missing)
    wrong = write_gguf(
        tmp_path / "b.gguf",
        lambda w: w.add_tokenizer_model("gpt2"),
        lambda w: w.add_token_list(["a"]),
        lambda w: w.add_token_types([1]),
        lambda w: w.add_token_merges(["x y"]),
    )
    with pytest.raises(ConfigError, match="cannot be built"):
        load_tokenizer(wrong)


# ── sentencepiece ────────────────────────────────────────────────────────────────────────────────


def test_unknown_characters_fall_back_to_bytes(pieces: Tokenizer) -> None:
    tokens = pieces.encode("the\n")
    assert tokens == [259 + PIECES.index("▁the"), 3 + 0x0A]
    assert pieces.decode(tokens) == "the\n"


def test_the_first_space_is_an_artefact_and_only_the_first(pieces: Tokenizer) -> None:
    the = 259 + PIECES.index("▁the")
    assert pieces.decode([the, the]) == "the the"
    assert pieces.decode([1, the]) == "the"
    assert pieces.token_text(the) == " the"


def test_sentencepiece_adds_its_start_token_by_default(pieces: Tokenizer) -> None:
    assert pieces.encode("the", add_special_tokens=True)[0] == 1
    assert pieces.special_ids == {0, 1, 2}


def test_without_space_prefix_nothing_is_added_or_dropped(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "a.gguf", sentencepiece(PIECES), lambda w: w.add_add_space_prefix(False)
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"
    assert tokenizer.encode("the") != tokenizer.encode(" the")


def naive_sentencepiece(text: str, ranks: dict[str, int]) -> list[str]:
    """While two neighbours make a known piece: merge the best such pair, of equals the leftmost."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(ranks.get(a + b), i) for i, (a, b) in enumerate(itertools.pairwise(symbols))]
        known = [(rank, i) for rank, i in joined if rank is not None]
        if not known:
            return symbols
        _, i = min(known)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


@given(text=st.text(alphabet=" theina", min_size=1))
def test_merges_by_score_agree_with_the_naive_algorithm(pieces: Tokenizer, text: str) -> None:
    ranks = {piece: rank for rank, piece in enumerate(PIECES)}
    expected = [259 + ranks[symbol] for symbol in naive_sentencepiece(text, ranks)]
    assert pieces.encode(text) == expected


# ── directories ──────────────────────────────────────────────────────────────────────────────────


def saved(tokenizer: Tokenizer, directory: Path) -> Path:
    save_tokenizer(tokenizer, directory)
    return directory


def test_a_saved_tokenizer_is_the_same_one(small: Tokenizer, tmp_path: Path) -> None:
    loaded = load_tokenizer(saved(small, tmp_path))
    text = "hello wonderful  né é 123 😀<|user|>"
    assert loaded.encode(text) == small.encode(text)
    assert loaded.decode(small.encode(text)) == small.decode(small.encode(text))
    assert loaded.eos_token_ids == small.eos_token_ids
    assert loaded.bos_token_id == small.bos_token_id
    assert loaded.chat_template == small.chat_template
    assert loaded.special_ids == small.special_ids


def test_end_tokens_are_collected_from_all_files(small: Tokenizer, tmp_path: Path) -> None:
    saved(small, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [USER, END]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load_tokenizer(tmp_path).eos_token_ids == (END, USER, 7)


@pytest.mark.parametrize(
    "template", ["x", [{"name": "tool", "template": "y"}, {"name": "default", "template": "x"}]]
)
def test_the_chat_template_is_found_in_the_configuration(
    small: Tokenizer, tmp_path: Path, template: str | Sequence[dict[str, str]]
) -> None:
    saved(small, tmp_path)
    config = {"chat_template": template, "eos_token": {"content": "<|user|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == "x"
    assert loaded.eos_token_ids[0] == USER


def test_a_template_file_comes_before_the_configuration(small: Tokenizer, tmp_path: Path) -> None:
    saved(small, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("né")
    assert load_tokenizer(tmp_path).chat_template == "né"


def test_directories_that_cannot_be_used_are_refused(small: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="neither"):
        load_tokenizer(tmp_path / "nowhere")
    saved(small, tmp_path)
    for text, message in (("{", "is not JSON"), ("[]", "must hold an object")):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be used"):
        load_tokenizer(tmp_path)


def test_a_decoder_of_another_family_is_refused() -> None:
    hf = HfTokenizer(models.BPE({"a": 0}, []))
    hf.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="neither byte-level"):
        Tokenizer(hf, eos_token_ids=(), bos_token_id=None, chat_template=None)
