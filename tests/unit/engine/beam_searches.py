"""Beam searches over the fake model: how to ask for one, what a plain one finds, what was said."""

from dataclasses import replace

from pdserve.ids import RequestId
from pdserve.messages import Beams, Request, Sampling, Token, TokenDelta
from tests.models.beams import Answer, beam_search
from tests.unit.engine.fakes import EOS, entry, logits_of
from tests.unit.engine.rig import Rig, prompt, request


def search(
    name: str = "r",
    tokens: tuple[int, ...] = prompt(10),
    *,
    width: int = 4,
    n: int | None = None,
    max_tokens: int = 12,
    ignore_eos: bool = False,
    **fields: object,
) -> Request:
    """``fields`` are those of ``Beams`` and of ``Sampling``."""
    own = {k: fields.pop(k) for k in ("length_penalty", "early_stopping") if k in fields}
    asked = request(
        name,
        tokens,
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        sampling=Sampling(temperature=0.0, **fields),  # type: ignore[arg-type]
    )
    return replace(asked, beams=Beams(width, n or width, **own))  # type: ignore[arg-type]


def expected(asked: Request) -> list[Answer]:
    beams = asked.beams
    assert beams is not None
    return beam_search(
        lambda tokens: logits_of(b"".join(entry(t, at) for at, t in enumerate(tokens))),
        asked.tokens,
        width=beams.width,
        max_tokens=asked.stop.max_tokens,
        eos=(*asked.stop.token_ids, *(() if asked.stop.ignore_eos else (EOS,))),
        length_penalty=beams.length_penalty,
    )[: beams.n]


def deltas(rig: Rig, name: str = "r") -> list[TokenDelta]:
    return rig.deltas.get(RequestId(name), [])


def answers(rig: Rig, name: str = "r") -> list[tuple[int, ...]]:
    """Of each hypothesis, whose deltas must follow one another."""
    found: dict[int, list[Token]] = {}
    for delta in deltas(rig, name):
        tokens = found.setdefault(delta.hypothesis, [])
        assert delta.offset == len(tokens)
        tokens += delta.tokens
    return [tuple(token.token for token in found[index]) for index in range(len(found))]
