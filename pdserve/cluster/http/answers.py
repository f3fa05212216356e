"""OpenAI's shapes for one choice: as a whole, and chunk by chunk. Pure.

A *dialect* is one of the two APIs. Both are told the same pieces; they differ in where text,
logprobs and roles go. ``Choice`` is what is remembered of one choice while its pieces arrive.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pdserve.cluster.gateway.calls import Piece
from pdserve.cluster.http.speech import PLAIN, Manner, Speech
from pdserve.cluster.why import US_PER_MS, decision_report, time_report
from pdserve.messages import FinishReason, Timing, Token, TokenLogprob
from pdserve.prompt_tasks import PromptScore
from pdserve.text.tokenizer import Tokenizer

LOGPROB_MIN = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


@dataclass(slots=True)
class Choice:
    """One choice so far. ``texts`` and ``tokens`` are kept only where the answer is sent whole."""

    index: int  # in the answer, over all prompts
    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    token_count: int = 0
    started: bool = False
    text_offset: int | None = None  # where the next token's own text begins, once that was asked
    prompt_scores: list[PromptScore] = field(default_factory=list)  # from its second token on
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    timing: Timing | None = None
    speech: Speech | None = None  # of a stream whose text is told apart

    def note(self, piece: Piece) -> None:
        self.token_count += len(piece.tokens)
        self.timing = piece.timing or self.timing
        if piece.finish is not None:
            self.finish = piece.finish
            self.stop_reason = piece.stop_reason

    def keep(self, piece: Piece) -> None:
        self.texts.append(piece.text)
        self.tokens.extend(piece.tokens)


class Dialect(Protocol):
    operation: str  # in metrics
    id_prefix: str
    object: str
    chunk_object: str

    def whole(self, choice: Choice) -> dict[str, Any]:
        """The choice, complete, from what was kept of it."""
        ...

    def chunks(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        """What a stream says of ``piece``; nothing while all its text is held back."""
        ...

    def beside(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """What a whole answer has beside its choices."""
        ...

    def is_text(self, choice: Choice, piece: Piece) -> bool:
        """Whether ``chunks`` says ``piece.text`` and nothing else that depends on the piece, in one
        chunk, and remembers nothing of it."""
        ...


class Scored:
    """vLLM's ``prompt_logprobs``: for each token of a prompt what could stand there, by id."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], top: int) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._top = top

    def of(self, choice: Choice) -> list[dict[str, Any] | None]:
        """The first token has none; each other's own entry comes first, then the best."""
        # A choice that was cancelled may lack some.
        scored = zip(self._prompt[1:], choice.prompt_scores, strict=False)
        return [None, *(self._entries(token, score) for token, score in scored)]

    def _entries(self, token: int, score: PromptScore) -> dict[str, Any]:
        entries = {str(token): self._entry(token, score.logprob, score.rank)}
        for rank, (other, value) in enumerate(score.top[: self._top], 1):
            entries.setdefault(str(other), self._entry(other, value, rank))
        return entries

    def _entry(self, token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {
            "logprob": max(logprob, LOGPROB_MIN),
            "rank": rank,
            "decoded_token": self._tokenizer.token_text(token),
        }


class _Lists:
    """OpenAI's older logprobs: four lists with an element per token."""

    def __init__(self, tokenizer: Tokenizer, first: int) -> None:
        """``first``: where in the text it begins."""
        self.end = first
        self._tokenizer = tokenizer
        self._texts: list[str] = []
        self._offsets: list[int] = []
        self._logprobs: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []

    def add(
        self, token: int, logprob: float | None, best: Sequence[tuple[int, float]] = ()
    ) -> None:
        """``logprob``: None for a token that nothing comes before."""
        text = self._tokenizer.token_text(token)
        self._texts.append(text)
        self._offsets.append(self.end)
        self.end += len(text)
        if logprob is None:
            self._logprobs.append(None)
            self._tops.append(None)
            return
        own = max(logprob, LOGPROB_MIN)
        top: dict[str, float] = {}
        for other, value in best:  # best first: it keeps a text that two tokens share
            top.setdefault(self._tokenizer.token_text(other), max(value, LOGPROB_MIN))
        top.setdefault(text, own)
        self._logprobs.append(own)
        self._tops.append(top)

    def told(self) -> dict[str, Any]:
        return {
            "tokens": self._texts,
            "text_offset": self._offsets,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._tops,
        }


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is repeated before its answers."""

    text: str
    tokens: Sequence[int]
    top: int = 0  # of the best in place of each

    def tell(self, lists: _Lists, choice: Choice) -> None:
        lists.add(self.tokens[0], None)
        for token, score in zip(self.tokens[1:], choice.prompt_scores, strict=False):
            lists.add(token, score.logprob, score.top[: self.top])


class Chat:
    operation = "chat"
    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        logprobs: bool,
        token_ids: bool = False,
        manner: Manner = PLAIN,
        calls_finish: bool = True,
        scored: Scored | None = None,
    ) -> None:
        """
        Args:
            scored: how the prompt's own scores are told; None: they are not.
            manner: how thoughts and calls are told apart from what is said.
            calls_finish: an answer that calls tools says that it ended for that; False where the
                client chose the call itself.
        """
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._token_ids = token_ids
        self._manner = manner
        self._calls_finish = calls_finish
        self._is_bare = manner.is_plain and not logprobs and not token_ids
        self._scored = scored

    def beside(self, choices: Sequence[Choice]) -> dict[str, Any]:
        if self._scored is None:
            return {}
        return {"prompt_logprobs": self._scored.of(choices[0])}

    def whole(self, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.texts)
        speech = None if self._manner.is_plain else Speech(self._manner)
        said = {"content": text} if speech is None else speech.message(text)
        return {
            "index": choice.index,
            "message": {"role": "assistant", **said, "refusal": None},
            "logprobs": self._scores(choice.tokens),
            "finish_reason": self._finish(choice.finish, speech),
            "stop_reason": choice.stop_reason,
            **_ids(self._token_ids, choice.tokens),
        }

    def chunks(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        chunks = []
        if not choice.started:
            choice.started = True
            chunks.append(_chat_chunk(choice.index, {"role": "assistant", "content": ""}))
        delta = self._delta(choice, piece)
        if piece.finish is not None:
            if self._logprobs:
                delta = delta or {"content": ""}
            chunks.append(
                _chat_chunk(
                    choice.index,
                    delta,
                    self._scores(piece.tokens),
                    self._finish(piece.finish, choice.speech),
                )
                | {"stop_reason": piece.stop_reason, **_ids(self._token_ids, piece.tokens)}
            )
        elif delta or (piece.tokens and (self._logprobs or self._token_ids)):
            chunks.append(
                _chat_chunk(choice.index, delta or {"content": ""}, self._scores(piece.tokens))
                | _ids(self._token_ids, piece.tokens)
            )
        return chunks

    def is_text(self, choice: Choice, piece: Piece) -> bool:
        ends = piece.finish is not None or piece.stop_reason is not None
        return bool(self._is_bare and choice.started and piece.text and not ends)

    def _delta(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """The fields of a delta that hold what is settled with ``piece``; none where nothing is."""
        if self._manner.is_plain:
            return {"content": piece.text} if piece.text else {}
        if choice.speech is None:
            choice.speech = Speech(self._manner)
        return choice.speech.delta(piece.text, last=piece.finish is not None)

    def _finish(self, finish: FinishReason | None, speech: Speech | None) -> str | None:
        calls = self._calls_finish and speech is not None and speech.has_calls
        return "tool_calls" if calls and finish is FinishReason.STOP else finish

    def _scores(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {"content": [self._score(token) for token in tokens], "refusal": None}

    def _score(self, token: Token) -> dict[str, Any]:
        logprob = token.logprob or TokenLogprob(LOGPROB_MIN)
        return {
            **self._entry(token.token, logprob.logprob),
            "top_logprobs": [self._entry(*best) for best in logprob.top],
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token),
            "logprob": max(logprob, LOGPROB_MIN),
            "bytes": list(self._tokenizer.token_bytes(token)),
        }


class Completion:
    operation = "completion"
    id_prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        logprobs: bool,
        token_ids: bool = False,
        echoes: Sequence[Echo] = (),
        n: int = 1,
        scored: Sequence[Scored] = (),
    ) -> None:
        """
        Args:
            echoes: each prompt where it is to be repeated before its ``n`` choices.
            scored: how each prompt's own scores are told where they are.
        """
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._token_ids = token_ids
        self._scored = scored
        self._echoes = echoes
        self._n = n
        self._is_bare = not logprobs and not token_ids

    def whole(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": self._echo(choice) + "".join(choice.texts),
            "logprobs": self._scores(choice, choice.tokens),
            "finish_reason": choice.finish,
            "stop_reason": choice.stop_reason,
            **_ids(self._token_ids, choice.tokens),
            **(
                {"prompt_logprobs": self._scored[choice.index // self._n].of(choice)}
                if self._scored
                else {}
            ),
        }

    def beside(self, _: Sequence[Choice]) -> dict[str, Any]:
        return {}

    def chunks(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        text = piece.text if choice.started else self._echo(choice) + piece.text
        # Of a stream that goes on elsewhere the echo was told; its tokens count all the same.
        told, choice.started = choice.started, True
        scores = self._scores(choice, piece.tokens, echoes=not told)
        if not (text or piece.finish or (piece.tokens and (self._logprobs or self._token_ids))):
            return []
        return [
            {
                "index": choice.index,
                "text": text,
                "logprobs": scores,
                "finish_reason": piece.finish,
                "stop_reason": piece.stop_reason,
                **_ids(self._token_ids, piece.tokens),
            }
        ]

    def is_text(self, choice: Choice, piece: Piece) -> bool:
        ends = piece.finish is not None or piece.stop_reason is not None
        return bool(self._is_bare and choice.started and piece.text and not ends)

    def _echo(self, choice: Choice) -> str:
        return self._echoes[choice.index // self._n].text if self._echoes else ""

    def _scores(
        self, choice: Choice, tokens: Sequence[Token], *, echoes: bool = True
    ) -> dict[str, Any] | None:
        """``echoes``: with those of the prompt, where it is repeated and was not yet."""
        if not self._logprobs:
            return None
        lists = _Lists(self._tokenizer, choice.text_offset or 0)
        if choice.text_offset is None and self._echoes:
            self._echoes[choice.index // self._n].tell(lists, choice)
            if not echoes:
                lists = _Lists(self._tokenizer, lists.end)
        for token in tokens:
            logprob = token.logprob or TokenLogprob(LOGPROB_MIN)
            lists.add(token.token, logprob.logprob, logprob.top)
        choice.text_offset = lists.end
        return lists.told()


def _ids(wanted: bool, tokens: Sequence[Token]) -> dict[str, Any]:
    """vLLM's field for clients that want ids beside text."""
    return {"token_ids": [token.token for token in tokens]} if wanted else {}


def _chat_chunk(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def usage(prompt_tokens: int, choices: Sequence[Sequence[Choice]]) -> dict[str, Any]:
    """Of a whole answer; ``choices`` per prompt."""
    completion_tokens = sum(choice.token_count for call in choices for choice in call)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(cached_tokens(c.timing for c in call) for call in choices)
        },
    }


def cached_tokens(timings: Iterable[Timing | None]) -> int:
    """Prompt tokens that no choice of a call had to compute.

    The prompt counts once however many choices it has, and the first choice computes it for all:
    so it is the smallest count that matters.
    """
    return min((timing.cached_tokens for timing in timings if timing is not None), default=0)


def timing_report(timing: Timing, *, first_token_us: int, total_us: int) -> dict[str, Any]:
    """The ``pdserve`` field of an answer: where the time went, and who spent it."""
    return {
        **time_report(timing),
        "first_token_ms": first_token_us / US_PER_MS,
        "total_ms": total_us / US_PER_MS,
    }


def server_timing(report: Mapping[str, Any], *, ended: bool) -> str:
    """A timing report as the header that browsers and proxies read (W3C Server Timing).

    Args:
        ended: False for a stream that begins: its whole length is not known yet.
    """
    parts = {
        "queue": report["queue_ms"],
        "prefill": report["prefill_ms"],
        "handoff": report["handoff_ms"],
        "first-token": report["first_token_ms"],
    }
    if ended:
        parts["total"] = report["total_ms"]
    return ", ".join(f"{name};dur={milliseconds:.3f}" for name, milliseconds in parts.items())


def decisions_report(choices: Iterable[Choice]) -> dict[str, Any]:
    """What that field has beside for who asks why: the router's decisions for every choice."""
    return {
        "decisions": [
            {"choice": choice.index, **decision_report(decision)}
            for choice in choices
            if choice.timing is not None
            for decision in choice.timing.decisions
        ]
    }
