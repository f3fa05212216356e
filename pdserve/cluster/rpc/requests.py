"""Between the messages of ``inference.proto`` and the session's vocabulary."""

import re
import secrets
from collections.abc import Mapping
from typing import Any

from pdserve.clock import steady_unix_ms
from pdserve.cluster.gateway import constraints
from pdserve.cluster.gateway.calls import Call, Piece, Session
from pdserve.cluster.gateway.parameters import Limits, Parameters, call_of, check_model, shown
from pdserve.cluster.gateway.prompts import chat_prompt, text_prompt, token_prompt
from pdserve.config import GatewayConfig
from pdserve.errors import InvalidField
from pdserve.messages import Decision, FinishReason, ServiceClass, Timing, Token, TokenLogprob
from pdserve.prompt_tasks import PromptScore
from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.text.tokenizer import Tokenizer

GENERATE_MAX_TOKENS = 16

_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")

_SERVICE_TIER: Mapping[int, str | None] = {
    pb.SERVICE_CLASS_UNSPECIFIED: None,
    pb.SERVICE_CLASS_INTERACTIVE: ServiceClass.INTERACTIVE,
    pb.SERVICE_CLASS_STANDARD: ServiceClass.STANDARD,
    pb.SERVICE_CLASS_BATCH: ServiceClass.BATCH,
}

_FINISH: Mapping[FinishReason | None, pb.FinishReason] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}

_OPTIONAL = (
    *("n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "ignore_eos"),
    *("include_stop_str_in_output", "skip_special_tokens", "logprobs", "user"),
    *("no_repeat_ngram_size", "best_of", "use_beam_search", "length_penalty", "early_stopping"),
    "prompt_logprobs",
)
"""Fields with presence that mean in ``Parameters`` what they mean in the message."""


async def generate_call(
    session: Session,
    config: GatewayConfig,
    request: pb.GenerateRequest,
    timeout_s: float | None,
    tenant: str | None,
) -> Call:
    adapter = check_model(request.model, session)
    field = request.WhichOneof("prompt")
    if field is None:
        raise InvalidField("prompt", "is missing; send text or token_ids")
    if field == "text":
        special = not request.HasField("add_special_tokens") or request.add_special_tokens
        prompt = await text_prompt(session, request.text, field="text", add_special_tokens=special)
    else:
        prompt = token_prompt(session, request.token_ids.ids, field="token_ids.ids")
    return await _call(
        session, config, request, adapter, tenant, prompt, timeout_s, field, GENERATE_MAX_TOKENS
    )


async def chat_call(
    session: Session,
    config: GatewayConfig,
    request: pb.ChatRequest,
    timeout_s: float | None,
    tenant: str | None,
) -> Call:
    adapter = check_model(request.model, session)
    opened = not request.HasField("add_generation_prompt") or request.add_generation_prompt
    messages = [_message(message) for message in request.messages]
    prompt = await chat_prompt(session, messages, add_generation_prompt=opened)
    return await _call(
        session, config, request, adapter, tenant, prompt, timeout_s, "messages", None
    )


def chunk_of(
    call: Call, piece: Piece, tokenizer: Tokenizer, *, event_id: str = "", first_score: int = 1
) -> pb.GenerateChunk:
    """``piece`` as a message; usage and timing are added by who knows them.

    Args:
        first_score: which of the prompt's tokens the first of the piece's scores is of.
    """
    chunk = pb.GenerateChunk(
        id=call.call,
        choice=piece.choice,
        event_id=event_id,
        text=piece.text,
        token_ids=[token.token for token in piece.tokens],
        finish_reason=_FINISH[piece.finish],
    )
    chunk.prompt_logprobs.extend(
        _prompt_logprob(call.prompt[index], score, tokenizer)
        for index, score in enumerate(piece.scores, first_score)
    )
    if call.sampling.logprobs is not None:
        chunk.logprobs.extend(_logprob(token, tokenizer) for token in piece.tokens)
    if isinstance(piece.stop_reason, str):
        chunk.stop_string = piece.stop_reason
    elif piece.stop_reason is not None:
        chunk.stop_token_id = piece.stop_reason
    return chunk


def timing_of(
    timing: Timing, *, first_token_us: int, total_us: int, why: bool = False
) -> pb.Timing:
    """``why``: with the router's decisions."""
    return pb.Timing(
        queued_us=timing.queued_us,
        prefill_us=timing.prefill_us,
        handoff_us=timing.handoff_us,
        first_token_us=first_token_us,
        total_us=total_us,
        cached_tokens=timing.cached_tokens,
        preempted_count=timing.preempted_count,
        parked_count=timing.parked_count,
        level=timing.level,
        prefill_worker=timing.prefill,
        decode_worker=timing.decode,
        decisions=[_decision(decision) for decision in timing.decisions] if why else (),
    )


async def _call(
    session: Session,
    config: GatewayConfig,
    request: pb.GenerateRequest | pb.ChatRequest,
    adapter: str | None,
    tenant: str | None,
    prompt: tuple[int, ...],
    timeout_s: float | None,
    prompt_field: str,
    default_max_tokens: int | None,
) -> Call:
    timeout_s = config.request_timeout_s if timeout_s is None else timeout_s
    parameters = _parameters(request.parameters)
    call = call_of(
        parameters,
        Limits(session.context_tokens, session.tokenizer.vocab_size, config.n_max),
        call=call_id(request.id),
        prompt=prompt,
        prompt_field=prompt_field,
        default_max_tokens=default_max_tokens,
        deadline_unix_ms=steady_unix_ms() + round(timeout_s * 1000),
        model=session.model_name,
        adapter=adapter,
        tenant=tenant,
    )
    await constraints.check(session.grammars, parameters)
    return call


def call_id(given: str) -> str:
    if given and not _ID.fullmatch(given):
        raise InvalidField("id", f"is {shown(given)}, must be 1 to 64 of a-z, A-Z, 0-9, _, . and -")
    return given or f"gen-{secrets.token_hex(12)}"


def _parameters(message: pb.Parameters) -> Parameters:
    said: dict[str, Any] = {
        name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)
    }
    if message.service_class not in _SERVICE_TIER:
        raise InvalidField("service_class", f"is {message.service_class}, which has no meaning")
    wanted = _constraint(message.constraint) if message.HasField("constraint") else None
    return Parameters(
        **said,
        logit_bias=dict(message.logit_bias),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        service_tier=_SERVICE_TIER[message.service_class],
        constraint=wanted.constraint if wanted else None,
        constraint_field=wanted.field if wanted else "",
    )


def _constraint(message: pb.Constraint) -> constraints.Wanted:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidField("constraint", "is empty; send one of its fields, or none of it")
    value = list(message.choice.texts) if kind == "choice" else getattr(message, kind)
    return constraints.structured_outputs("constraint", {kind: value})


def _message(message: pb.ChatMessage) -> dict[str, str]:
    told = {"role": message.role, "content": message.content}
    return {**told, "name": message.name} if message.name else told


def _decision(decision: Decision) -> pb.Decision:
    return pb.Decision(
        at_unix_us=decision.at_unix_us,
        reason=decision.reason,
        waited_us=decision.waited_us,
        level=decision.level,
        work_us=decision.work_us,
        cached_tokens=decision.cached_tokens,
        prefill_worker=decision.prefill,
        decode_worker=decision.decode,
        price_us=decision.price_us,
        others=[pb.Price(worker=worker, price_us=price) for worker, price in decision.others],
    )


def _prompt_logprob(token: int, score: PromptScore, tokenizer: Tokenizer) -> pb.PromptLogprob:
    return pb.PromptLogprob(
        token_id=token,
        token=tokenizer.token_text(token),
        logprob=score.logprob,
        rank=score.rank,
        top=[
            pb.TopLogprob(token_id=other, token=tokenizer.token_text(other), logprob=value)
            for other, value in score.top
        ],
    )


def _logprob(token: Token, tokenizer: Tokenizer) -> pb.TokenLogprob:
    logprob = token.logprob or TokenLogprob(float("-inf"))
    return pb.TokenLogprob(
        token_id=token.token,
        token=tokenizer.token_text(token.token),
        token_bytes=tokenizer.token_bytes(token.token),
        logprob=logprob.logprob,
        top=[
            pb.TopLogprob(token_id=other, token=tokenizer.token_text(other), logprob=value)
            for other, value in logprob.top
        ],
    )
