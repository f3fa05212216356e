"""What one request has delivered: tokens exactly once, text cut at stop strings. Pure.

Token deltas of one request may come from several workers: the one that ran it first, the one that
took it over after a park, the one that ran its second attempt. Each names its attempt and the
offset of its first token, and that is all it takes:

    another attempt than the current one   dropped
    tokens below the next offset           dropped: the client has them
    a delta beyond the next offset         held until the gap is filled, ``HELD_MAX`` of them; a gap
                                           that stays makes another attempt (``gaps``)

A new attempt begins where delivery stands, so what a lost worker still had to say is dropped, and
the tokens are equal anyway: token i depends on the tokens before it and on Philox(seed, choice, i).

A beam search answers for all choices of its call. Nothing of it is certain before its end, so its
next attempt begins at the prompt, and finds the same answers: those delivered by then stay.
"""

from collections.abc import Sequence
from dataclasses import replace

from pdserve.cluster.gateway.calls import Piece
from pdserve.errors import PdserveError
from pdserve.ids import BlockKey
from pdserve.messages import FinishReason, Request, Token, TokenDelta
from pdserve.text.detokenizer import Detokenizer
from pdserve.text.stops import StopStrings

HELD_MAX = 256
"""Out-of-order deltas kept. The two ends of a park overlap by a handful of steps; where the first
one's are lost there may be more, and those beyond are left to the next attempt."""


class Delivery:
    """One request's way to its client, over all attempts."""

    def __init__(
        self, request: Request, detokenizer: Detokenizer, *, include_stop_string: bool = False
    ) -> None:
        self.request = request
        self.tokens: list[int] = []  # delivered
        self.finished = False
        self._detokenizer = detokenizer
        self._stops = StopStrings(request.stop.strings)
        self._include_stop_string = include_stop_string
        self._held: dict[int, TokenDelta] = {}
        self._left_out = False  # a delta of this attempt that was one too many

    @property
    def has_gap(self) -> bool:
        """Whether tokens are known to have been generated that did not come before later ones."""
        return bool(self._held) or self._left_out

    @property
    def open_choices(self) -> tuple[int, ...]:
        """Choices whose ``finish`` is still to come."""
        return () if self.finished else (self.request.choice,)

    def next_attempt(self, keys: Sequence[BlockKey]) -> Request:
        """The request again, with everything delivered so far behind its prompt.

        ``keys`` are those of the full blocks of ``tokens_so_far()``.
        """
        self._held.clear()
        self._left_out = False
        self.request = replace(
            self.request,
            attempt=self.request.attempt + 1,
            tokens=self.tokens_so_far(),
            block_keys=tuple(keys),
        )
        return self.request

    def tokens_so_far(self) -> tuple[int, ...]:
        return self.request.tokens[: self.request.prompt_tokens] + tuple(self.tokens)

    def on_delta(self, delta: TokenDelta) -> list[Piece]:
        """The pieces that ``delta`` completes, in order.

        Raises:
            PdserveError: the worker's error, where the delta carries one.
        """
        if delta.attempt != self.request.attempt or self.finished:
            return []
        if delta.offset > len(self.tokens):
            if len(self._held) < HELD_MAX:
                self._held[delta.offset] = delta
            else:
                self._left_out = True
            return []
        pieces = self._accept(delta)
        while not self.finished and len(self.tokens) in self._held:
            pieces += self._accept(self._held.pop(len(self.tokens)))
        return pieces

    def _accept(self, delta: TokenDelta) -> list[Piece]:
        if delta.error is not None:
            self.finished = True
            error: PdserveError = delta.error.to_error()
            raise error
        fresh = delta.tokens[len(self.tokens) - delta.offset :]
        self.tokens.extend(token.token for token in fresh)
        text, hit = self._text(fresh)
        finish = delta.finish
        if hit is not None:
            finish = FinishReason.STOP
        elif finish is not None:
            text += self._flush()
        if not (fresh or text or finish):
            return []
        self.finished = finish is not None
        return [
            Piece(
                choice=self.request.choice,
                text=text,
                tokens=fresh,
                finish=finish,
                stop_reason=hit if hit is not None else delta.stop_reason,
                timing=delta.timing,
            )
        ]

    def _text(self, tokens: Sequence[Token]) -> tuple[str, str | None]:
        text = self._detokenizer.push([token.token for token in tokens])
        text, hit = self._stops.push(text)
        if hit is not None and self._include_stop_string:
            text += hit
        return text, hit

    def _flush(self) -> str:
        text, hit = self._stops.push(self._detokenizer.flush())
        return text if hit is not None else text + self._stops.flush()


class BeamDelivery:
    """A beam search's way to its client: each hypothesis is delivered as a choice of its own."""

    def __init__(
        self, request: Request, detokenizer: Detokenizer, *, include_stop_string: bool = False
    ) -> None:
        """``detokenizer`` has had the prompt, and is left as it is."""
        assert request.beams is not None, f"{request.request} is no beam search"
        self.request = request
        self.finished = False
        self._choices = [
            Delivery(
                replace(request, choice=choice),
                detokenizer.fork(),
                include_stop_string=include_stop_string,
            )
            for choice in range(request.beams.n)
        ]

    @property
    def open_choices(self) -> tuple[int, ...]:
        if self.finished:
            return ()
        return tuple(choice for each in self._choices for choice in each.open_choices)

    def next_attempt(self, keys: Sequence[BlockKey]) -> Request:
        """The request again, from its prompt on; ``keys`` are those of ``tokens_so_far()``."""
        for each in self._choices:
            each.next_attempt(())  # it is never submitted
        self.request = replace(
            self.request, attempt=self.request.attempt + 1, block_keys=tuple(keys)
        )
        return self.request

    def tokens_so_far(self) -> tuple[int, ...]:
        return self.request.tokens

    def on_delta(self, delta: TokenDelta) -> list[Piece]:
        """As ``Delivery.on_delta``. An error is that of all choices."""
        if self.finished:
            return []
        try:
            pieces = self._choices[delta.hypothesis].on_delta(delta)
        except PdserveError:
            self.finished = True
            raise
        self.finished = not self.open_choices
        return pieces
