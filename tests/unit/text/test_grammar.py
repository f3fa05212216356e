"""Masks allow what the constraint allows, wherever an answer is taken up, and nothing else."""

import json
import random
import re
import threading

import jsonschema
import pytest

from pdserve.errors import ConstraintFailed
from pdserve.messages import Constraint, ConstraintKind
from pdserve.text import grammar
from pdserve.text.grammar import Grammars, Guide
from pdserve.text.tokenizer import Tokenizer
from tests.unit.text.support import END

SCHEMA = {
    "type": "object",
    "properties": {
        "hello": {"type": "string", "maxLength": 9},
        "wo": {"enum": ["hé", 'q"', 7]},
        "n": {"type": "integer", "minimum": -5, "maximum": 120},
    },
    "required": ["hello", "wo"],
    "additionalProperties": False,
}
TOKENS_MAX = 400


def constraint(kind: str, text: str) -> Constraint:
    return Constraint(ConstraintKind(kind), text)


OBJECT = constraint("json_schema", json.dumps(SCHEMA))
CHOICES = constraint("choice", json.dumps(["hell", "hello", 'né "é"\n', "wo/w"]))
REGEX = constraint("regex", r"\d{2}/(hello|wo\\)+")
LARK = constraint("lark", 'start: "(" start ")" | "x" ","')


@pytest.fixture(scope="module")
def grammars(small: Tokenizer) -> Grammars:
    return Grammars(small)


def allowed_of(guide: Guide, place: int = 0) -> list[int]:
    mask = int.from_bytes(guide.allowed(place) or b"", "little")
    return [token for token in range(mask.bit_length()) if mask >> token & 1]


def answer(grammars: Grammars, asked: Constraint, chance: random.Random, *ends: int) -> list[int]:
    """Tokens drawn from those that are allowed, up to the end; ``ends`` are not among them. What
    is looked at on the way is what is found when the answer is taken up there."""
    guide = Guide(grammars, asked, ())
    tokens: list[int] = []
    while not guide.complete and len(tokens) < TOKENS_MAX:
        guide.look_ahead()
        allowed = allowed_of(guide)
        replayed = Guide(grammars, asked, tokens)
        replayed.look_ahead()
        assert allowed_of(replayed) == allowed
        assert guide.problem is None
        token = chance.choice(allowed)
        if token in ends:
            return tokens
        guide.push(token)
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_drawn_is_what_was_asked_for(
    grammars: Grammars, small: Tokenizer, seed: int
) -> None:
    chance = random.Random(seed)
    for asked in (OBJECT, CHOICES, REGEX, LARK):
        text = small.decode(answer(grammars, asked, chance, END))
        match asked.kind:
            case ConstraintKind.JSON_SCHEMA:
                jsonschema.validate(json.loads(text), SCHEMA)
            case ConstraintKind.CHOICE:
                assert text in json.loads(asked.text)
            case ConstraintKind.REGEX:
                assert re.fullmatch(asked.text, text, re.ASCII)
            case ConstraintKind.LARK:
                depth = len(text) // 2 - 1
                assert text == "(" * depth + "x," + ")" * depth


def test_an_answer_may_end_where_it_is_one_and_must_where_it_cannot_go_on(
    grammars: Grammars, small: Tokenizer
) -> None:
    def after(text: str) -> Guide:
        guide = Guide(grammars, CHOICES, ())
        for token in small.encode(text):
            guide.look_ahead()
            guide.push(token)
        guide.look_ahead()
        return guide

    assert END not in allowed_of(after("he"))
    assert [small.token_text(token) for token in allowed_of(after("hell"))] == ["o", "<|end|>"]
    assert not after("hell").complete
    assert after("hello").complete


def test_masks_along_drafts_are_those_of_steps(grammars: Grammars, small: Tokenizer) -> None:
    guide = Guide(grammars, REGEX, ())
    drafts = small.encode("12/hellox")
    assert guide.fitting(drafts) == 0  # not open: nothing is known
    guide.look_ahead(drafts)
    guide.open()  # late, from another thread say: it disturbs nothing
    assert guide.fitting(drafts) == len(drafts) - 1
    masks = [allowed_of(guide, place) for place in range(len(drafts))]
    assert guide.allowed(len(drafts)) is None
    for place, token in enumerate(drafts[:-1]):
        guide.look_ahead()
        assert allowed_of(guide) == masks[place]
        guide.push(token)


def test_sentencepiece_answers_too(pieces: Tokenizer) -> None:
    asked = constraint("choice", '["the in", "né"]')
    tokens = answer(Grammars(pieces), asked, random.Random(0), *pieces.eos_token_ids)
    assert b"".join(map(pieces.token_bytes, tokens)).decode() in ("the in", "né")


@pytest.mark.parametrize(
    ("kind", "text", "problem"),
    [
        ("json_schema", '{"type": "objekt"}', "objekt"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", "[1]", "must be an object"),
        ("json_schema", "false", "Unsatisfiable"),
        ("json_schema", json.dumps({"enum": ["x" * 50] * 2000}), "at most 65536"),
        ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000, "recursion"),
        ("regex", "(a", "unclosed group"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "a\\", "backslash"),
        ("regex", "", "empty"),
        ("regex", "x" * 5000, "at most 4096"),
        ("regex", r"[^\s\S]", "NoExtension"),
        ("lark", "rule: X", "start"),
        ("lark", "start: start", "NoExtension"),
        ("lark", "start: <|end|>", "empty"),
        ("choice", '[""]', "empty"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    grammars: Grammars, kind: str, text: str, problem: str
) -> None:
    with pytest.raises(ConstraintFailed, match=problem) as refused:
        grammars.check(constraint(kind, text))
    assert len(str(refused.value)) < 400
    assert "no_forcing" not in str(refused.value)


def test_a_model_without_an_end_of_sequence_cannot_be_held_to_anything() -> None:
    import tokenizers
    from tokenizers.decoders import ByteLevel
    from tokenizers.models import WordLevel

    hf = tokenizers.Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    hf.decoder = ByteLevel()
    endless = Tokenizer(hf, eos_token_ids=(), bos_token_id=None, chat_template=None)
    with pytest.raises(ConstraintFailed, match="no end-of-sequence"):
        Grammars(endless).check(constraint("regex", "a+"))


def test_a_problem_stays_one_answers(
    grammars: Grammars, small: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was forced by hand, or what the library gives up, ends one guide; the next is fresh."""
    guide = Guide(grammars, LARK, small.encode(")"))
    guide.look_ahead()
    assert guide.problem
    assert guide.allowed(0) is None
    guide.look_ahead()
    guide.push(0)  # nothing happens any more
    unseen = Guide(grammars, LARK, ())
    unseen.push(small.encode("x")[0])
    assert unseen.problem is not None
    assert "not looked at" in unseen.problem

    class Panic(BaseException):
        pass

    def panics(_: Constraint) -> None:
        raise Panic("it broke")

    monkeypatch.setattr(grammars, "matcher", panics)
    broken = Guide(grammars, LARK, ())
    broken.look_ahead()
    assert broken.problem == "it broke"
    monkeypatch.undo()
    assert answer(grammars, LARK, random.Random(1), END)


def test_the_work_of_one_mask_is_bounded(grammars: Grammars, small: Tokenizer) -> None:
    """A million letters that must come are not computed before they come; what is too much for one
    place is a problem there."""
    long = constraint("regex", "((a{100}){100}){100}")
    wide = {f"p{index}": {"type": "string", "maxLength": 5000} for index in range(1000)}
    wider = constraint("json_schema", json.dumps({"type": "object", "properties": wide}))
    problems = []
    for asked, text in ((long, "aaaa"), (wider, '{"')):
        guide = Guide(grammars, asked, ())
        for token in small.encode(text):
            guide.look_ahead()
            guide.push(token)
        problems.append(guide.problem or "")
    assert problems[0] == ""
    assert "max is" in problems[1]


def test_compiled_ones_are_kept_and_the_oldest_go(
    small: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "COMPILED_MAX", 2)
    compiled: list[str] = []
    compiler = grammar._compile

    def counting(asked: Constraint, *others: object) -> object:
        compiled.append(asked.text)
        return compiler(asked, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(grammar, "_compile", counting)
    grammars = Grammars(small)
    for text in ("a", "b", "a", "c", "a", "b"):
        grammars.check(constraint("regex", text))
    assert compiled == ["a", "b", "c", "b"]


def test_threads_share_what_is_compiled(small: Tokenizer) -> None:
    grammars = Grammars(small)
    together = threading.Barrier(6)
    texts: list[str] = []

    def one(seed: int) -> None:
        together.wait(timeout=30)
        texts.append(small.decode(answer(grammars, CHOICES, random.Random(seed), END)))

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(texts) == 6
    assert set(texts) <= set(json.loads(CHOICES.text))
