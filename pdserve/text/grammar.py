"""Grammars that an answer must follow, and where an answer stands in one.

A *constraint* (a JSON schema, a regular expression, choices, a Lark grammar) is compiled for one
tokenizer, once per process as long as it is in use. A *guide* follows one answer through it: which
tokens may come next, one bit for each, and whether anything may come at all. End-of-sequence is
among them exactly where the text so far is one that the constraint allows.

*A guide is a function of the constraint and the tokens so far.* It is made from the tokens wherever
a request runs or resumes, and no state of it travels.

*Every token that keeps the answer within the constraint is allowed.* The library could also say
which tokens must come, spelt as the tokenizer would spell them; that takes calls back into Python,
and time that grows with what is forced: ``a{1000000}`` is a second. Masks alone are bounded.

The compiler and the masks are ``llguidance``'s, which is imported at the first use. Its calls let
other threads run. What goes wrong in a grammar (``ConstraintFailed``) ends one request.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pdserve.errors import ConstraintFailed
from pdserve.messages import Constraint, ConstraintKind
from pdserve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

BYTES_MAX: Mapping[ConstraintKind, int] = MappingProxyType(
    {
        ConstraintKind.JSON_SCHEMA: 64 * 1024,
        ConstraintKind.CHOICE: 64 * 1024,
        ConstraintKind.LARK: 16 * 1024,
        ConstraintKind.REGEX: 4 * 1024,
    }
)
"""Of a constraint's text, which every message of the request carries. An ordinary one compiles in a
few ms; one made to be slow takes the library time that grows with the square of a regular
expression's length, 4 kB of ``.*`` about a second before it is refused."""

COMPILED_MAX = 64
"""Grammars kept per process, those used last."""

LEXER_STATES_MAX = 20_000
"""Of one grammar, about 2 kB each: so much memory may many answers to one constraint fill. An
ordinary schema has hundreds."""

STEP_LEXER_FUEL = 100_000
STEP_ITEMS_MAX = 25_000
"""What one mask may cost: 7 ms of the lexer's work and 1 ms of the parser's."""

WHITE_SPACE = r"[ \t\r\n]{1,64}"
"""In one place of a JSON answer: a line's end and deep indentation."""

PROBLEM_CHARACTERS_MAX = 300

_MASKS_ALONE = '%llguidance {"no_forcing": true}\n'


class Grammars:
    """Compiled constraints of one tokenizer. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()  # used last is last
        self._library: tuple[LLTokenizer, LLParserLimits] | None = None

    def check(self, constraint: Constraint) -> None:
        """Compile it, and look at the first token.

        Raises:
            ConstraintFailed: it is too long, it cannot be compiled, or it allows no text but the
                empty one; the message says which and why.
        """
        guide = Guide(self, constraint, ())
        guide.look_ahead()
        if guide.problem is not None:
            raise ConstraintFailed(guide.problem)
        mask = int.from_bytes(guide.allowed(0) or b"", "little")
        for token in self._tokenizer.eos_token_ids:
            mask &= ~(1 << token)
        if not mask:
            raise ConstraintFailed("allows no text but the empty one")

    def matcher(self, constraint: Constraint) -> "LLMatcher":
        """A matcher at the beginning of an answer, for the caller alone.

        Raises:
            ConstraintFailed: as ``check``.
        """
        with self._lock:
            compiled = self._compiled.get(constraint)
            if compiled is not None:
                self._compiled.move_to_end(constraint)
                return compiled.deep_copy()
            tokenizer, limits = self._opened()
        compiled = _compile(constraint, tokenizer, limits)
        with self._lock:
            self._compiled[constraint] = compiled
            while len(self._compiled) > COMPILED_MAX:
                self._compiled.popitem(last=False)
            return compiled.deep_copy()

    def forget(self, constraint: Constraint) -> None:
        """Its answers share what they found out of it: one that ran into a limit is not the last
        to, unless the next begins afresh."""
        with self._lock:
            self._compiled.pop(constraint, None)

    def _opened(self) -> tuple["LLTokenizer", "LLParserLimits"]:
        if self._library is None:
            from llguidance import LLParserLimits

            limits = LLParserLimits(
                max_lexer_states=LEXER_STATES_MAX,
                step_lexer_fuel=STEP_LEXER_FUEL,
                step_max_items=STEP_ITEMS_MAX,
                verbose_errors=False,
            )
            self._library = _library_tokenizer(self._tokenizer), limits
        return self._library


class Guide:
    """One answer's. Threads may share it: who asks while another looks ahead waits for that."""

    def __init__(self, grammars: Grammars, constraint: Constraint, tokens: Sequence[int]) -> None:
        """``tokens`` are those generated so far. Nothing is compiled here."""
        self.problem: str | None = None
        """Why this answer cannot go on."""

        self.complete = False
        """Nothing may follow the last token pushed."""

        self._grammars = grammars
        self._constraint = constraint
        self._replayed = tuple(tokens)
        self._matcher: LLMatcher | None = None
        self._masks: list[bytes] = []
        self._lock = threading.Lock()

    def open(self) -> None:
        """Compile and replay, which the first look ahead does where nobody did before. Any number
        of times, at any moment."""
        self._guarded(self._opened)

    def look_ahead(self, drafts: Sequence[int] = ()) -> None:
        """Compute which tokens may come next, and which after each of ``drafts``, as far as they
        may come themselves."""
        self._guarded(lambda: self._look_ahead(drafts))

    def allowed(self, draft_count: int) -> bytes | None:
        """The tokens that may follow so many of the drafts that were looked at: a bit for each,
        lowest first. None: those drafts may not come themselves, or there is a problem."""
        return self._masks[draft_count] if draft_count < len(self._masks) else None

    def fitting(self, drafts: Sequence[int]) -> int:
        """How many of ``drafts`` may come next, one after the other; none before it is open."""
        with self._lock:
            if self._matcher is None or self.problem is not None:
                return 0
            return self._matcher.validate_tokens(list(drafts))

    def push(self, token: int) -> None:
        """The next token, drawn from those that were allowed."""
        self._guarded(lambda: self._push(token))

    def _opened(self) -> "LLMatcher":
        if self._matcher is None:
            matcher = self._grammars.matcher(self._constraint)
            matcher.consume_tokens(list(self._replayed))
            _check(matcher)
            self._matcher = matcher
        return self._matcher

    def _look_ahead(self, drafts: Sequence[int]) -> None:
        matcher = self._opened()
        self._masks = [matcher.compute_bitmask()]
        _check(matcher)
        for token in drafts:
            matcher = matcher.deep_copy() if matcher is self._matcher else matcher
            if matcher.is_stopped() or not matcher.consume_token(token):
                return
            mask = matcher.compute_bitmask()
            if matcher.is_error():
                return  # if the drafts so far hold, the answer ends there, as it would without them
            self._masks.append(mask)

    def _push(self, token: int) -> None:
        if not self._masks or self._matcher is None:
            raise ConstraintFailed(f"token {token} came after one that was not looked at")
        del self._masks[0]
        self._matcher.consume_token(token)
        _check(self._matcher)
        self.complete = self._matcher.is_stopped()

    def _guarded(self, work: Callable[[], object]) -> None:
        """Whatever happens in the library is this answer's problem and nobody else's."""
        with self._lock:
            if self.problem is not None:
                return
            try:
                work()
            except BaseException as error:  # its panics are not an ``Exception``
                self.problem = _shortened(str(error))
                self._masks = []
                self._grammars.forget(self._constraint)


def _check(matcher: "LLMatcher") -> None:
    if matcher.is_error():
        raise ConstraintFailed(matcher.get_error())


def _compile(
    constraint: Constraint, tokenizer: "LLTokenizer", limits: "LLParserLimits"
) -> "LLMatcher":
    from llguidance import LLMatcher

    size_bytes = len(constraint.text.encode())
    bytes_max = BYTES_MAX[constraint.kind]
    if size_bytes > bytes_max:
        raise ConstraintFailed(f"has {size_bytes} bytes, at most {bytes_max} are allowed")
    matcher = LLMatcher(
        tokenizer, json.dumps({"grammars": _grammars_of(constraint)}), log_level=0, limits=limits
    )
    _check(matcher)
    return matcher


def _grammars_of(constraint: Constraint) -> list[dict[str, Any]]:
    """In the library's own format: the first is the one that counts."""
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            answer = {"name": "answer", "json_schema": _with_little_space(constraint.text)}
            return [{"lark_grammar": _MASKS_ALONE + "start: @answer"}, answer]
        case ConstraintKind.REGEX:
            from llguidance import regex_to_lark

            backslashes = len(constraint.text) - len(constraint.text.rstrip("\\"))
            if backslashes % 2:  # it would escape the end of the rule
                raise ConstraintFailed("ends with a backslash that escapes nothing")
            rule = f"start: /{regex_to_lark(constraint.text, 'd')}/"  # \d as 0 to 9 alone
        case ConstraintKind.CHOICE:
            rule = "start: " + " | ".join(map(json.dumps, json.loads(constraint.text)))
        case ConstraintKind.LARK:
            rule = constraint.text
    # Behind the client's lines, so that a line number in a message is the client's.
    return [{"lark_grammar": f"{rule}\n{_MASKS_ALONE}"}]


def _with_little_space(text: str) -> Any:
    """The schema, in whose answers white space has an end: models that have nothing to say go on
    with it for ever. Who writes ``x-guidance``, the library's own keyword, says it otherwise."""
    schema = json.loads(text)
    if schema is True:
        schema = {}
    if isinstance(schema, dict):
        schema.setdefault("x-guidance", {"whitespace_pattern": WHITE_SPACE})
    return schema


def _library_tokenizer(tokenizer: Tokenizer) -> "LLTokenizer":
    """The vocabulary as the library wants it: each token's bytes, special ones set apart."""
    from llguidance import LLTokenizer, TokenizerWrapper

    if not tokenizer.eos_token_ids:
        raise ConstraintFailed("the model's tokenizer has no end-of-sequence token to end with")

    return LLTokenizer(
        TokenizerWrapper(_Vocabulary(tokenizer)), eos_token=list(tokenizer.eos_token_ids)
    )


class _Vocabulary:
    """What the library's wrapper reads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._encode = tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode())


def _shortened(text: str) -> str:
    """The library's message on one line, without its ornaments and without what is ours."""
    words = " ".join(text.replace("<non-verbose/>", "").partition(_MASKS_ALONE.strip())[0].split())
    return words if len(words) <= PROBLEM_CHARACTERS_MAX else words[:PROBLEM_CHARACTERS_MAX] + "…"
