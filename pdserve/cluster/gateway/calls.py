"""What the two fronts, HTTP and gRPC, ask of the gateway's session, and what they get back.

A *call* is what a client sent: ``n`` choices over one prompt. The session turns it into requests,
one per choice (a beam search is one request for all), follows them through losses and new attempts,
and yields *pieces* in order per choice. What is asked of the prompt itself is a request before
those. The fronts know neither attempts nor workers.
"""

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from pdserve.ids import BlockKey
from pdserve.messages import Beams, FinishReason, Sampling, ServiceClass, Stop, Timing, Token
from pdserve.prompt_tasks import PromptScore, PromptTask
from pdserve.text.chat import ChatTemplate
from pdserve.text.grammar import Grammars
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
    model: str = ""  # whose session has it; nothing is the first model of the gateway
    adapter: str | None = None  # by its name; None: the base model
    beams: Beams | None = None  # search for the choices, instead of drawing each
    best_of: int | None = None  # draw so many, give the ``n`` likeliest; None: draw ``n``
    retries: int = 0  # so often the client says it has asked before
    pin_ms: int | None = None  # how long the store keeps the prompt softly; None: as any
    task: PromptTask | None = None
    """What is asked of the prompt. ``Pooling`` is all that is wanted then; scores come before the
    choices, and alone where ``stop.max_tokens`` is 0."""

    @property
    def request_count(self) -> int:
        """Requests that it becomes: one per choice, but one for a whole beam search."""
        return 1 if self.beams else self.n


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new for one choice; ``text`` may be empty while a character or stop is open."""

    choice: int
    text: str
    tokens: tuple[Token, ...]
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    timing: Timing | None = None  # with the first and with the last piece
    scores: tuple[PromptScore, ...] = ()  # of the prompt's next tokens, from its second one on
    vector: bytes = b""  # float32, little-endian: the prompt, pooled


class Session(Protocol):
    model_name: str
    identity: str  # of the model and its numerics: with another one answers may differ
    adapters: Collection[str]  # their names
    context_tokens: int
    tokenizer: Tokenizer
    template: ChatTemplate
    grammars: Grammars

    def generate(self, call: Call) -> AsyncIterator[Piece]:
        """The pieces of all choices, interleaved; ends when every choice has its ``finish``.

        Closing the iterator cancels what still runs, everywhere. Raises ``PdserveError`` for a
        refusal or a failure; what was yielded before stays true.
        """
        ...

    def bursts(self, call: Call) -> AsyncIterator[Sequence[Piece]]:
        """``generate``, with as many pieces at once as are ready; never none. Between two bursts
        the event loop has a turn, also where nothing is awaited with the first."""
        ...

    def block_keys(
        self, tokens: Sequence[int], tenant: str, adapter: str | None
    ) -> tuple[BlockKey, ...]:
        """What the store calls the full blocks of a tenant's prompt."""
        ...

    def cancel(self, call: str, *, tenant: str | None = None) -> bool:
        """Cancels a running call by id: its pieces end with ``CANCELLED``. False: not running, or
        not this tenant's; None: whoever's it is."""
        ...
