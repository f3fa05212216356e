"""From a parsed body to the calls it asks for, and how their answer is to be told."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pdserve.clock import steady_unix_ms, unix_ms
from pdserve.cluster.gateway import constraints
from pdserve.cluster.gateway.calls import Call, Session
from pdserve.cluster.gateway.parameters import (
    Limits,
    Parameters,
    call_of,
    check_model,
    check_scores,
    shown,
    truncated,
)
from pdserve.cluster.gateway.prompts import chat_prompt, text_prompt, token_prompt
from pdserve.cluster.http.answers import Chat, Completion, Dialect, Echo, Scored
from pdserve.cluster.http.hints import deadline_unix_ms, retries_of
from pdserve.cluster.http.schemas import ChatBody, CompletionBody, checked, prompts_of
from pdserve.cluster.http.speech import Manner
from pdserve.cluster.http.tools import Tools, tools_of
from pdserve.config import GatewayConfig
from pdserve.errors import InvalidField
from pdserve.prompt_tasks import Scoring

PROMPTS_MAX = 128
"""Prompts in one completion request; each is a call."""

COMPLETION_MAX_TOKENS = 16
"""What OpenAI's completions generate unless they are told otherwise."""

WHY_HEADER = "x-pdserve-why"
FLAG_WORDS: Mapping[str | None, bool] = MappingProxyType(
    {None: False, "0": False, "false": False, "1": True, "true": True}
)


@dataclass(frozen=True, slots=True)
class Asked:
    id: str
    model: str  # that answers
    calls: tuple[Call, ...]  # one per prompt
    n: int  # choices per call
    dialect: Dialect
    stream: bool
    include_usage: bool  # a last chunk with the usage
    continuous_usage: bool  # usage in every chunk
    include_timing: bool
    include_why: bool  # the router's decisions, and the timing

    @property
    def prompt_tokens(self) -> int:
        return sum(len(call.prompt) for call in self.calls)


async def chat_asked(
    session: Session,
    config: GatewayConfig,
    tree: Mapping[str, Any],
    headers: Mapping[str, str],
    tenant: str | None,
) -> Asked:
    body = checked(ChatBody, tree)
    adapter = check_model(body.model, session)
    tools = tools_of(body.tools, body.tool_choice, body.parallel_tool_calls)
    parameters = body.parameters(tools.constraint() if tools else None)
    prompt = await chat_prompt(
        session,
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        tools=tools.tools if tools else None,
        arguments=body.chat_template_kwargs,
    )
    prompt = truncated(prompt, body.truncate_prompt_tokens, limits_of(session, config))
    scored = None
    if body.prompt_logprobs is not None:
        scored = Scored(session.tokenizer, prompt, body.prompt_logprobs)
    dialect = Chat(
        session.tokenizer,
        logprobs=bool(body.logprobs),
        token_ids=bool(body.return_token_ids),
        manner=_manner(config, tools, constrained=parameters.constraint is not None),
        calls_finish=not (tools and tools.named),
        scored=scored,
    )
    return await _asked(
        session,
        config,
        body,
        headers,
        adapter,
        tenant=tenant,
        parameters=parameters,
        dialect=dialect,
        prompts=[("messages", prompt)],
    )


def _manner(config: GatewayConfig, tools: Tools | None, *, constrained: bool) -> Manner:
    """What follows a constraint from its first token on has no thoughts, and calls no tool unless
    that is the constraint."""
    if constrained:
        return Manner(calls="required" if tools and tools.required else None)
    return Manner(
        reasoning=config.reasoning_parser, calls=config.tool_call_parser if tools else None
    )


async def completion_asked(
    session: Session,
    config: GatewayConfig,
    tree: Mapping[str, Any],
    headers: Mapping[str, str],
    tenant: str | None,
) -> Asked:
    body = checked(CompletionBody, tree)
    adapter = check_model(body.model, session)
    given = prompts_of(body.prompt)
    if len(given) > PROMPTS_MAX:
        raise InvalidField("prompt", f"holds {len(given)} prompts, at most {PROMPTS_MAX} pass")
    prompts = []
    for index, item in enumerate(given):
        field = "prompt" if len(given) == 1 else f"prompt.{index}"
        if isinstance(item, str):
            special = body.add_special_tokens is not False
            tokens = await text_prompt(session, item, field=field, add_special_tokens=special)
        else:
            tokens = token_prompt(session, item, field=field)
        tokens = truncated(tokens, body.truncate_prompt_tokens, limits_of(session, config))
        prompts.append((field, tokens))
    dialect = Completion(
        session.tokenizer,
        logprobs=body.logprobs is not None,
        token_ids=bool(body.return_token_ids),
        echoes=_echoes(session, body, given, prompts) if body.echo else (),
        n=body.n or 1,
        scored=[
            Scored(session.tokenizer, tokens, body.prompt_logprobs)
            for _, tokens in prompts
            if body.prompt_logprobs is not None
        ],
    )
    return await _asked(
        session,
        config,
        body,
        headers,
        adapter,
        tenant=tenant,
        parameters=body.parameters(),
        dialect=dialect,
        prompts=prompts,
        default_max_tokens=COMPLETION_MAX_TOKENS,
    )


async def _asked(
    session: Session,
    config: GatewayConfig,
    body: ChatBody | CompletionBody,
    headers: Mapping[str, str],
    adapter: str | None,
    *,
    tenant: str | None,
    parameters: Parameters,
    dialect: Dialect,
    prompts: Sequence[tuple[str, tuple[int, ...]]],
    default_max_tokens: int | None = None,
) -> Asked:
    limits = limits_of(session, config)
    include_usage, continuous_usage = body.usage_wanted()
    name = dialect.id_prefix + secrets.token_hex(12)
    ends_unix_ms = ending_of(headers, config, stream=bool(body.stream))
    calls = tuple(
        call_of(
            parameters,
            limits,
            call=name if len(prompts) == 1 else f"{name}-{index}",
            prompt=prompt,
            prompt_field=field,
            default_max_tokens=default_max_tokens,
            deadline_unix_ms=ends_unix_ms,
            retries=retries_of(headers),
            model=session.model_name,
            adapter=adapter,
            tenant=tenant,
            stream=bool(body.stream),
        )
        for index, (field, prompt) in enumerate(prompts)
    )
    task = calls[0].task
    if isinstance(task, Scoring):  # each is no more than it may be; together they may be
        check_scores(parameters.prompt_logprobs_field, sum(len(p) for _, p in prompts), task)
    await constraints.check(session.grammars, parameters)
    return Asked(
        id=name,
        model=adapter or session.model_name,
        calls=calls,
        n=calls[0].n,
        dialect=dialect,
        stream=bool(body.stream),
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        include_timing=bool(body.include_timing),
        include_why=why_of(headers) or bool(body.pdserve and body.pdserve.why),
    )


def why_of(headers: Mapping[str, str]) -> bool:
    """Whether the header asks for the router's decisions."""
    return flag_of(headers, WHY_HEADER)


def flag_of(headers: Mapping[str, str], name: str) -> bool:
    """Whether a header of ours is there and says yes."""
    text = headers.get(name)
    wanted = FLAG_WORDS.get(text if text is None else text.lower())
    if wanted is None:
        raise InvalidField(name, f"is {shown(text)}, must be 1, true, 0 or false")
    return wanted


def ending_of(headers: Mapping[str, str], config: GatewayConfig, *, stream: bool) -> int:
    """``deadline_unix_ms`` of a request that has come now."""
    return deadline_unix_ms(
        headers,
        now_unix_ms=steady_unix_ms(),
        wall_unix_ms=unix_ms(),
        longest_ms=round(config.request_timeout_s * 1000),
        stream=stream,
    )


def limits_of(session: Session, config: GatewayConfig) -> Limits:
    return Limits(session.context_tokens, session.tokenizer.vocab_size, config.n_max)


def _echoes(
    session: Session,
    body: CompletionBody,
    given: Sequence[str | list[int]],
    prompts: Sequence[tuple[str, tuple[int, ...]]],
) -> list[Echo]:
    """As they were sent; of those that were truncated what is left."""
    echoes = []
    for item, (_, tokens) in zip(given, prompts, strict=True):
        sent = isinstance(item, str) and body.truncate_prompt_tokens is None
        text = str(item) if sent else session.tokenizer.decode(tokens)
        echoes.append(Echo(text, tokens, body.logprobs or 0))
    return echoes
