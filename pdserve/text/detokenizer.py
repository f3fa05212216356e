"""Token ids to text, as the tokens come.

A token's piece is bytes and may end within a character: an emoji often takes three tokens. So the
pieces go through an incremental UTF-8 decoder, which keeps an unfinished character back until the
rest of it has come. Each byte is looked at once, and the texts of all pushes and the flush, joined,
are exactly ``Tokenizer.decode`` of all tokens, however they were split into pushes.
"""

import codecs
import copy
from collections.abc import Sequence

from pdserve.text.tokenizer import Tokenizer

_UNFINISHED_BYTES_MAX = 4
"""An unfinished UTF-8 character is at most three bytes long; what stands before it is settled."""


class Detokenizer:
    """One stream of tokens.

    Args:
        prompt: tokens before the stream. Their text is not emitted, but a character that they
            begin is, with the stream's first token, and the stream is no longer the beginning
            of a text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        tail = self._tail(prompt)
        self._at_start = not tail
        self._decoder.decode(tail)

    def fork(self) -> "Detokenizer":
        """A stream of its own that has had the same tokens."""
        other = copy.copy(self)
        other._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        other._decoder.setstate(self._decoder.getstate())
        return other

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty."""
        return self._decoder.decode(self._bytes(tokens))

    def flush(self) -> str:
        """What was kept back: nothing, or U+FFFD for a character that never became whole."""
        return self._decoder.decode(b"", final=True)

    def _bytes(self, tokens: Sequence[int]) -> bytes:
        data = b"".join(
            self._tokenizer.token_bytes(token) for token in tokens if token not in self._skipped
        )
        if self._at_start and data:
            self._at_start = False
            return self._tokenizer.without_first_space(data)
        return data

    def _tail(self, prompt: Sequence[int]) -> bytes:
        """The last bytes of the prompt, enough to know whether it ends within a character."""
        tail = b""
        for token in reversed(prompt):
            if len(tail) >= _UNFINISHED_BYTES_MAX:
                break
            if token not in self._skipped:
                tail = self._tokenizer.token_bytes(token) + tail
        return tail
