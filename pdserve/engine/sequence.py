"""One request's tokens at one worker: what is known of it, where its KV lies, when it ends.

Between workers a sequence is token ids and nothing else. Whatever depends on its past (block keys,
the text that stop strings are searched in, the index that seeds the next draw) is replayed from
them here, so a request goes on the same on whichever worker takes it up.

    tokens  = prompt + generated; generated ones count from 0 over all attempts
    kv_count  tokens whose keys and values are in the device pool: the first so many

A beam search has a sequence for its prompt, whose one generated token is the best of the first
candidates and settles nothing, and one for each beam, which begins as a *fork* of another.
"""

import copy
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace

from pdserve.engine.blocks import BlockTable
from pdserve.errors import ConstraintFailed, PdserveError
from pdserve.ids import BlockId, BlockKey, RequestId
from pdserve.kvstore.keys import KeyChain
from pdserve.messages import FinishReason, Request, Route, Timing, Token
from pdserve.model.sampler import SamplerRow
from pdserve.text.detokenizer import Detokenizer
from pdserve.text.grammar import Guide
from pdserve.text.stops import StopStrings
from pdserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a request ends; ``stop_reason`` is the stop string or stop token that did it, ``error``
    what went wrong with ``FinishReason.ERROR``."""

    finish: FinishReason
    stop_reason: str | int | None = None
    error: PdserveError | None = None


class EndingRules:
    """Looks at every generated token of one request, in order, and says when it is the last.

    ``min_tokens`` is not looked at: below it the sampler is forbidden what would end the request.
    Stop strings count from the first generated token on, as the gateway's own search does.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, context_tokens: int) -> None:
        stop = request.stop
        self._stop_token_ids = frozenset(stop.token_ids)
        self._eos_token_ids = frozenset(() if stop.ignore_eos else tokenizer.eos_token_ids)
        self._generated_max = min(stop.max_tokens, context_tokens - request.prompt_tokens)
        self._generated_count = 0
        self._strings = StopStrings(stop.strings) if stop.strings else None
        if self._strings is not None:
            prompt = request.tokens[: request.prompt_tokens]
            self._detokenizer = Detokenizer(tokenizer, prompt=prompt)

    @property
    def enders(self) -> tuple[int, ...]:
        """The tokens that end the request wherever they appear."""
        return tuple(sorted(self._stop_token_ids | self._eos_token_ids))

    @property
    def tokens_left(self) -> int:
        """How many more tokens there may be."""
        return max(0, self._generated_max - self._generated_count)

    def fork(self) -> "EndingRules":
        """Rules of their own that have looked at the same tokens."""
        other = copy.copy(self)
        if self._strings is not None:
            other._strings = self._strings.fork()
            other._detokenizer = self._detokenizer.fork()
        return other

    def push(self, token: int) -> Ending | None:
        self._generated_count += 1
        if token in self._stop_token_ids:
            return Ending(FinishReason.STOP, token)
        if token in self._eos_token_ids:
            return Ending(FinishReason.STOP)
        if self._strings is not None:
            _shown, hit = self._strings.push(self._detokenizer.push((token,)))
            if hit is not None:
                return Ending(FinishReason.STOP, hit)
        return None if self.tokens_left else Ending(FinishReason.LENGTH)


class Sequence:
    def __init__(
        self,
        request: Request,
        route: Route,
        tokens: Tokens[int],
        timing: Timing,
        *,
        keys: Tokens[BlockKey],
        namespace: bytes,
        tokenizer: Tokenizer,
        block_tokens: int,
        context_tokens: int,
        guide: Guide | None = None,
    ) -> None:
        """``keys`` are those of the first full blocks of ``tokens``, as many as are known; those of
        another namespace are ignored. ``guide`` stands behind the tokens, where the request has a
        constraint."""
        self.request = request
        self.route = route
        self.timing = timing
        self.tokens = list(tokens)
        self.kv_count = 0
        self.guide = guide
        self.namespace = namespace
        self.table = BlockTable(block_tokens)
        self._chain = KeyChain(namespace, block_tokens, tenant=request.tenant)
        # Keys are chained, so the first one tells for all. While versions change, a gateway may
        # name blocks as the other version's workers do: what is computed here must not get there.
        if keys and self._chain.extend(self.tokens[:block_tokens]) == tuple(keys[:1]):
            self._chain = KeyChain(namespace, block_tokens, tenant=request.tenant, keys=keys)
        self._rules = EndingRules(request, tokenizer, context_tokens)
        self._enders = self._rules.enders
        self._sampling = request.sampling
        if request.beams is not None:
            wanted = max(2 * request.beams.width, request.sampling.logprobs or 0)
            self._sampling = replace(request.sampling, logprobs=wanted)
        # A constrained answer ends where nothing may follow, and who ignores end-of-sequence only
        # there: its text has to be one that the constraint allows.
        ignores_eos = guide is not None and request.stop.ignore_eos
        self._withheld = tokenizer.eos_token_ids if ignores_eos else ()
        self.ending: Ending | None = None
        if request.beams is None:
            for token in self.tokens[request.prompt_tokens :]:
                self.ending = self.ending or self._rules.push(token)
        if request.task is None and self.ending is None and not self._rules.tokens_left:
            self.ending = Ending(FinishReason.LENGTH)

    @property
    def id(self) -> RequestId:
        return self.request.request

    @property
    def blocks(self) -> list[BlockId]:
        return self.table.blocks

    @property
    def generated_count(self) -> int:
        return len(self.tokens) - self.request.prompt_tokens

    @property
    def tokens_left(self) -> int:
        """How many more tokens may be generated."""
        return self._rules.tokens_left

    @property
    def full_blocks(self) -> int:
        """Blocks whose every token has KV."""
        return self.kv_count // self.table.block_tokens

    @property
    def tail_block(self) -> BlockId | None:
        """The block that has KV for some of its tokens, but not for all."""
        partial = self.kv_count % self.table.block_tokens
        return self.blocks[self.full_blocks] if partial else None

    def keys(self, block_count: int) -> tuple[BlockKey, ...]:
        """The keys of the first ``block_count`` full blocks of ``tokens``."""
        return self._chain.extend(self.tokens)[:block_count]

    @property
    def enders(self) -> tuple[int, ...]:
        """The tokens that end it wherever they appear."""
        return self._enders

    def would_end(self, token: int) -> Ending | None:
        """What its ending would be if ``token`` came next; it stays as it is."""
        return self._rules.fork().push(token)

    def fork(self) -> "Sequence":
        """Another sequence with the same past as far as it has KV, and without blocks."""
        other = copy.copy(self)
        other.tokens = self.tokens[: self.kv_count]
        other.table = BlockTable(self.table.block_tokens)
        other._rules = self._rules.fork()
        other._chain = copy.copy(self._chain)  # it holds nothing that changes
        return other

    def sampler_row(self, drafts: Tokens[int] = ()) -> SamplerRow:
        """How the next token is drawn: a function of the tokens so far and of the request.

        After ``drafts``: how it is drawn if these are the tokens that come first.
        """
        index, stop = self.generated_count + len(drafts), self.request.stop
        early = self._enders if index < stop.min_tokens else ()
        return SamplerRow(
            sampling=self._sampling,
            seed=self.request.seed,
            choice=self.request.choice,
            index=index,
            tokens=[*self.tokens, *drafts] if drafts else self.tokens,
            prompt_tokens=self.request.prompt_tokens,
            forbidden=early + self._withheld,
            allowed=self.guide.allowed(len(drafts)) if self.guide is not None else None,
            adjusted_logprobs=self.request.beams is not None,
        )

    def accept(self, token: Token) -> None:
        """Append a sampled token; ``ending`` is set when it was the last."""
        assert self.ending is None, f"{self.id} has ended, it takes no more tokens"
        self.tokens.append(token.token)
        self.ending = self._rules.push(token.token)
        if self.guide is not None:
            self.guide.push(token.token)
            self.ending = _guided(self.ending, self.guide)


def _guided(ending: Ending | None, guide: Guide) -> Ending | None:
    """A complete answer is one even where the token limit falls on its last token."""
    if guide.problem is not None:
        return Ending(FinishReason.ERROR, error=ConstraintFailed(guide.problem))
    if guide.complete and (ending is None or ending.finish is FinishReason.LENGTH):
        return Ending(FinishReason.STOP)
    return ending


def stretch_us(timing: Timing, now_unix_us: int) -> int:
    """How long the stretch now running has lasted, by ``clock.steady_unix_us``; 0 when none was
    begun."""
    return max(0, now_unix_us - timing.since_unix_us) if timing.since_unix_us else 0
