"""What the two fronts, HTTP and gRPC, ask of the gateway's session, and what they get back.

A *call* is what a client sent: ``n`` choices over one prompt. The session turns it into requests,
one per choice, follows them through losses and new attempts, and yields *pieces* in order per
choice. The fronts know neither attempts nor workers.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from pdserve.messages import FinishReason, Sampling, ServiceClass, Stop, Timing, Token
from pdserve.text.chat import ChatTemplate
from pdserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Call:
    call: str  # what the client sees as the id, e.g. "chatcmpl-…"
    prompt: tuple[int, ...]
    n: int
    sampling: Sampling
    stop: Stop
    seed: int | None  # None: the session draws one
    tenant: str
    service_class: ServiceClass
    deadline_unix_ms: int
    skip_special_tokens: bool = True
    include_stop_string: bool = False
    prompt_field: str = "messages"  # what to name when the prompt does not fit


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new for one choice; ``text`` may be empty while a character or stop is open."""

    choice: int
    text: str
    tokens: tuple[Token, ...]
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    timing: Timing | None = None  # with the first and with the last piece


class Session(Protocol):
    model_name: str
    context_tokens: int
    tokenizer: Tokenizer
    template: ChatTemplate

    def generate(self, call: Call) -> AsyncIterator[Piece]:
        """The pieces of all choices, interleaved; ends when every choice has its ``finish``.

        Closing the iterator cancels what still runs, everywhere. Raises ``PdserveError`` for a
        refusal or a failure; what was yielded before stays true.
        """
        ...

    def cancel(self, call: str) -> bool:
        """Cancels a running call by id: its pieces end with ``CANCELLED``. False: not running."""
        ...
