"""``/v1/embeddings``: from its body to the vectors, in OpenAI's shape with vLLM's fields."""

import asyncio
import base64
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.cluster.gateway.calls import Call, Session
from pdserve.cluster.gateway.embedding import Embedded, Vector, embedded, pooling_call, shortened
from pdserve.cluster.gateway.parameters import check_model, shown, truncated
from pdserve.cluster.gateway.prompts import text_prompt, token_prompt
from pdserve.cluster.http.metrics import Meter
from pdserve.cluster.http.prompt_answers import Ask, PromptAnswer, note_usage, usage_of
from pdserve.cluster.http.schemas import EmbeddingBody, checked, prompts_of
from pdserve.errors import InvalidField
from pdserve.prompt_tasks import Pooling, PoolingKind

INPUTS_MAX = 2048
"""In one request, as OpenAI has it."""

DIMENSIONS_MAX = 1 << 16
"""More than any model's; the model's own bound is known once a vector is there."""

ENCODINGS = ("float", "base64")


@dataclass(frozen=True, slots=True)
class _Wanted:
    id: str
    model: str
    calls: tuple[Call, ...]
    dimensions: int | None
    normalize: bool
    base64: bool


class Embeddings(PromptAnswer[_Wanted]):
    operation = "embedding"

    async def ask(self, asked: Ask) -> _Wanted:
        return await _wanted(asked)

    async def answer(self, session: Session, wanted: _Wanted, meter: Meter) -> bytes:
        found = await embedded(session, wanted.calls, meter)
        note_usage(meter, [each.timing for each in found])
        return await asyncio.to_thread(_told, wanted, found, meter)  # it may have megabytes


async def _wanted(asked: Ask) -> _Wanted:
    session = asked.session
    body = checked(EmbeddingBody, asked.tree)
    adapter = check_model(body.model, session)
    encoding = "float" if body.encoding_format is None else body.encoding_format
    if encoding not in ENCODINGS:
        raise InvalidField(
            "encoding_format", f"is {shown(encoding)}, must be one of {', '.join(ENCODINGS)}"
        )
    if body.dimensions is not None and not 1 <= body.dimensions <= DIMENSIONS_MAX:
        raise InvalidField(
            "dimensions", f"is {shown(body.dimensions)}, must be from 1 to what the model has"
        )
    said = body.use_activation if body.normalize is None else body.normalize
    task = Pooling(PoolingKind(asked.config.pooling), normalize=said is not False)
    limits = asked.limits
    name = f"embd-{secrets.token_hex(12)}"
    shared = asked.shared(body, adapter)
    prompts = await _prompts(session, body)
    calls = [
        pooling_call(
            name if len(prompts) == 1 else f"{name}-{index}",
            truncated(prompt, body.truncate_prompt_tokens, limits),
            task,
            limits,
            prompt_field=field,
            **shared,
        )
        for index, (field, prompt) in enumerate(prompts)
    ]
    return _Wanted(
        id=name,
        model=adapter or session.model_name,
        calls=tuple(calls),
        dimensions=body.dimensions,
        normalize=task.normalize,
        base64=encoding == "base64",
    )


async def _prompts(session: Session, body: EmbeddingBody) -> list[tuple[str, tuple[int, ...]]]:
    """Each input's name and tokens."""
    given = prompts_of(body.input, name="input")
    if len(given) > INPUTS_MAX:
        raise InvalidField("input", f"holds {len(given)} inputs, at most {INPUTS_MAX} pass")
    special = body.add_special_tokens is not False
    prompts = []
    for index, item in enumerate(given):
        field = "input" if len(given) == 1 else f"input.{index}"
        if isinstance(item, str):
            tokens = await text_prompt(session, item, field=field, add_special_tokens=special)
        else:
            tokens = token_prompt(session, item, field=field)
        prompts.append((field, tokens))
    return prompts


def _told(wanted: _Wanted, found: Sequence[Embedded], meter: Meter) -> bytes:
    vectors = [
        shortened(each.vector, wanted.dimensions, normalize=wanted.normalize) for each in found
    ]
    body = {
        "id": wanted.id,
        "object": "list",
        "created": int(time.time()),
        "model": wanted.model,
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _base64(vector) if wanted.base64 else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ],
        "usage": usage_of(meter),
    }
    return json.dumps(body, allow_nan=False).encode()


def _base64(vector: Vector) -> str:
    """Of float32, little-endian, as OpenAI's libraries read it."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
