"""Text to token ids and back.

The splitting and merging is the ``tokenizers`` library's. What we add is one view of all families:
every token is a *piece*, a string of bytes, and the text of many tokens is their pieces, joined and
read as UTF-8. That holds for both alphabets in use:

* *byte-level* (GPT-2, Llama 3, Qwen, SmolLM): each character of a token stands for one byte;
* *sentencepiece* (Llama 2, Mistral): a token is text with ``▁`` for a space, or ``<0x0A>`` for one
  byte; the very first space of a text is an artefact and dropped.

Added tokens such as ``<|im_end|>`` stand for their own characters in both. Ids that the vocabulary
lacks (models pad theirs) have an empty piece. A piece may end within a character: bytes that are
no UTF-8 become U+FFFD, as everywhere else; ``detokenizer`` does the same for a stream.

A tokenizer comes from a directory (``tokenizer.json`` and its companions) or from the metadata of
a GGUF file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdserve.errors import ConfigError

if TYPE_CHECKING:
    import tokenizers  # engines that no text reaches run where it is not installed

SPACE_MARK = "▁"
_BYTE_PIECES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


def _byte_level_alphabet() -> dict[int, int]:
    """Which byte each character of a byte-level token stands for, for ``str.translate``.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for the
    characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(printable))
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()


class Tokenizer:
    """One model's vocabulary. Immutable but for a cache; threads may share it."""

    def __init__(
        self,
        hf: "tokenizers.Tokenizer",
        *,
        eos_token_ids: tuple[int, ...],
        bos_token_id: int | None,
        chat_template: str | None,
    ) -> None:
        hf.no_truncation()
        hf.no_padding()
        added = hf.get_added_tokens_decoder()
        self.hf = hf
        self.vocab_size: int = hf.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids = eos_token_ids
        self.bos_token_id = bos_token_id
        self.chat_template = chat_template
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self._pieces: dict[int, bytes] = {
            token: entry.content.encode() for token, entry in added.items()
        }
        # The library hides what its decoder is made of, so ask it to decode something telling.
        self._byte_level = _decodes(hf, ["Ġ"], " ")
        self._drops_first_space = not self._byte_level and _decodes(hf, ["▁a"], "a")
        if not self._byte_level and not _decodes(hf, ["a", "▁b"], "a b"):
            raise ConfigError(
                "the tokenizer's decoder is neither byte-level nor of the sentencepiece kind; "
                "serve a model of the Llama, Mistral or Qwen families"
            )

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids. Special tokens written out in ``text`` become themselves."""
        # The library's fast way keeps no offsets, a sixth of the work; it has none for one text.
        (encoded,) = self.hf.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoded.ids
        return ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        skipped = self.special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(token) for token in tokens if token not in skipped)
        return self.without_first_space(data).decode(errors="replace")

    def token_text(self, token: int) -> str:
        """One token's own text; half a character shows as U+FFFD."""
        return self.token_bytes(token).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._piece(token)
        return piece

    def without_first_space(self, data: bytes) -> bytes:
        """``data``, the beginning of a text, less the space that sentencepiece put there."""
        return data.removeprefix(b" ") if self._drops_first_space else data

    def _piece(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            return b""
        content: str | None = self.hf.id_to_token(token)
        if content is None:
            return b""
        if self._byte_level:
            return content.translate(_BYTE_OF_CHARACTER).encode("latin-1", errors="replace")
        return _BYTE_PIECES.get(content) or content.replace(SPACE_MARK, " ").encode()


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model directory or of a ``.gguf`` file.

    Raises:
        ConfigError: there is none, or none that can be used; the message says what to do.
    """
    if path.is_file() and path.suffix == ".gguf":
        from pdserve.text.gguf_tokenizer import tokenizer_of_gguf

        return tokenizer_of_gguf(path)
    if not path.is_dir():
        raise ConfigError(f"{path} is neither a model directory nor a .gguf file")
    return _from_directory(path)


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write what ``load_tokenizer`` reads: ``tokenizer.json`` and its companions."""
    tokenizer.hf.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if tokenizer.bos_token_id is not None:
        config["bos_token"] = tokenizer.token_text(tokenizer.bos_token_id)
    if tokenizer.eos_token_ids:
        config["eos_token"] = tokenizer.token_text(tokenizer.eos_token_ids[0])
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    generation = {"eos_token_id": list(tokenizer.eos_token_ids)}
    (directory / "generation_config.json").write_text(json.dumps(generation))


def _from_directory(directory: Path) -> Tokenizer:
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(
            f"{directory} holds no tokenizer.json; write one with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...), or serve the model's GGUF"
        )
    import tokenizers

    try:
        hf = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise ConfigError(f"{file} cannot be used: {error}") from error
    config = _read_json(directory / "tokenizer_config.json")
    return Tokenizer(
        hf,
        eos_token_ids=_eos_token_ids(hf, directory, config),
        bos_token_id=_token_id(hf, config.get("bos_token")),
        chat_template=_chat_template(directory, config),
    )


def _eos_token_ids(
    hf: "tokenizers.Tokenizer", directory: Path, config: Mapping[str, Any]
) -> tuple[int, ...]:
    """The tokenizer's own one first, then what generation stops at beside it."""
    stated = [_token_id(hf, config.get("eos_token"))]
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(directory / name).get("eos_token_id")
        stated += ids if isinstance(ids, list) else [ids]
    return tuple(dict.fromkeys(token for token in stated if isinstance(token, int)))


def _token_id(hf: "tokenizers.Tokenizer", token: object) -> int | None:
    """The id of a token as ``tokenizer_config.json`` names it: text, or a mapping with it."""
    content = token.get("content") if isinstance(token, dict) else token
    found: int | None = hf.token_to_id(content) if isinstance(content, str) else None
    return found


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several under names; "default" is the one for chats
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    """The object in ``file``; nothing where the file is missing."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} must hold an object, not {type(value).__name__}")
    return value


def _decodes(hf: "tokenizers.Tokenizer", pieces: list[str], text: str) -> bool:
    return bool(hf.decoder is not None and hf.decoder.decode(pieces) == text)
