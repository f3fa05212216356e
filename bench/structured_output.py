"""What a JSON schema costs: compiled, looked ahead in, and beside steps of the same batch without.

    python -m bench.structured_output [--quick] [--json FILE]

The default model on this machine, one process. Eight sequences decode, greedy: in turn a step in
which all eight follow a schema of 2 kB, as a worker has it, and a step of eight that follow
nothing.
"""

import json
import time
from collections.abc import Callable, Iterator

from bench.frame import Options, Row, interleave, row, run
from bench.http_load import random_tokens
from bench.plain_loop import PlainLoop, PlainSequence
from pdserve.config import ModelConfig
from pdserve.engine.masks import looking_ahead
from pdserve.messages import Constraint, ConstraintKind
from pdserve.model.load import load_runner
from pdserve.model.runner import ModelRunner, Run
from pdserve.model.sampler import SamplerRow, sample
from pdserve.model.source import locate
from pdserve.text.grammar import Grammars, Guide
from pdserve.text.tokenizer import load_tokenizer

SEQUENCES = 8
PROMPT_TOKENS = 64
ROUNDS = 200
FIELDS = {
    f"field_{index}": {"type": "string", "maxLength": 80, "description": "A few words, or a name."}
    if index % 2
    else {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 9}
    for index in range(24)
}
ITEM = {
    "type": "object",
    "properties": FIELDS,
    "required": list(FIELDS),
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": ITEM, "minItems": 10_000}  # no answer to it is complete


class ConstrainedLoop(PlainLoop):
    """The plain loop, each sequence under a guide of its own."""

    def __init__(self, runner: ModelRunner, *, first_block: int) -> None:
        super().__init__(runner, first_block=first_block)
        self.guides: list[Guide] = []

    def look_ahead(self) -> None:
        for guide in self.guides:
            guide.look_ahead()

    def decode(self) -> None:
        guided = list(zip(self.sequences, self.guides, strict=True))
        rows = looking_ahead([(guide, ()) for guide in self.guides], (_row(*one) for one in guided))
        runs = [Run(s.tokens[-1:], len(s.tokens) - 1, s.blocks) for s in self.sequences]
        logits = self._runner.step(runs)
        for (sequence, guide), token in zip(guided, sample(logits, list(rows)), strict=True):
            sequence.tokens.append(token.token)
            guide.push(token.token)
            assert guide.problem is None, guide.problem


def _row(sequence: PlainSequence, guide: Guide) -> SamplerRow:
    plain = sequence.row()
    return SamplerRow(
        plain.sampling,
        plain.seed,
        plain.choice,
        plain.index,
        plain.tokens,
        plain.prompt_tokens,
        allowed=guide.allowed(0),
    )


def measure(options: Options) -> Iterator[Row]:
    rounds = options.rounds(ROUNDS)
    model = ModelConfig()
    grammars = Grammars(load_tokenizer(locate(model).path))
    yield row("first use in a process", [_timed_ms(lambda: grammars.check(_schema({})))], "ms")
    schema = _schema(ITEM)

    def compile_again() -> None:
        grammars.forget(schema)
        grammars.check(schema)

    compiled = interleave(rounds, schema=lambda: _timed_ms(compile_again))
    yield row(f"compile {len(schema.text)} bytes", compiled["schema"], "ms")

    room_tokens = PROMPT_TOKENS + rounds + 2
    runner = load_runner(model, block_count=2 * SEQUENCES * -(-room_tokens // 16), pool_bytes=0)
    plain = PlainLoop(runner)
    constrained = ConstrainedLoop(runner, first_block=runner.pool.block_count // 2)
    for index in range(SEQUENCES):
        prompt = random_tokens(PROMPT_TOKENS, index)
        for loop in (plain, constrained):
            loop.prefill(loop.add(list(prompt), room_tokens=room_tokens), PROMPT_TOKENS)
        constrained.sequences[-1].tokens.pop()  # drawn under no guide
        constrained.guides.append(Guide(grammars, _schema(ENDLESS), ()))
    constrained.look_ahead()
    steps = interleave(
        rounds,
        constrained=lambda: _timed_ms(constrained.decode),
        plain=lambda: _timed_ms(plain.decode),
        masks=lambda: _timed_ms(constrained.look_ahead),
    )
    yield row("mask of a row", [1000 * ms / SEQUENCES for ms in steps["masks"]], "µs")
    yield row(
        f"decode step, {SEQUENCES} rows under a schema", steps["constrained"], "ms",
        reference="under none", reference_samples=steps["plain"],
    )  # fmt: skip


def _schema(schema: object) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema))


def _timed_ms(action: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    action()
    return (time.perf_counter() - began_s) * 1000


if __name__ == "__main__":
    run("structured_output", measure)
