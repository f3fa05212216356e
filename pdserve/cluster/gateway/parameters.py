"""From a client's parameters to ours: every bound that a request's numbers must keep, in one place.

Both fronts bring what the client sent as ``Parameters``, field by field, None where nothing was
said. Types are right by then; values are not yet. The functions here fill in defaults, check
ranges and sizes, and raise ``InvalidField`` under the name that the client used. NaN fails every
range check, because it compares with nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from pdserve.cluster.gateway.calls import Call, Session
from pdserve.cluster.gateway.pinning import lifetime_ms_of
from pdserve.errors import (
    ConflictingFields,
    InvalidField,
    PromptTooLong,
    UnknownModel,
    UnusableValue,
)
from pdserve.messages import Beams, Constraint, Sampling, ServiceClass, Stop
from pdserve.prompt_tasks import Scoring

DEFAULT_TENANT = "default"

STOP_STRINGS_MAX = 64
STOP_STRING_CHARACTERS_MAX = 1024
STOP_TOKENS_MAX = 256
LOGIT_BIAS_MAX = 1024
LOGPROBS_MAX = 20
SCORES_MAX = 1 << 19  # of prompts' tokens, with the best in their places, in one answer
PIN_MS_MAX = 24 * 3600 * 1000
TENANT_CHARACTERS_MAX = 256
MODEL_CHARACTERS_MAX = 256
TOP_K_MAX = 2**31 - 1
NO_REPEAT_NGRAM_SIZE_MAX = 64  # each token is compared with what came before, so many deep
BEAM_WIDTH_MAX = 16  # each beam is a sequence of a decode worker's batch, with blocks of its own
LENGTH_PENALTY_MAX = 10.0  # longer contexts than a million tokens to this power are still floats
SHOWN_CHARACTERS_MAX = 60

SEED_MIN, SEED_MAX = -(2**63), 2**63 - 1

SERVICE_TIERS: Mapping[str, ServiceClass] = MappingProxyType(
    {
        "auto": ServiceClass.STANDARD,
        "default": ServiceClass.STANDARD,
        "standard": ServiceClass.STANDARD,
        "scale": ServiceClass.STANDARD,
        "priority": ServiceClass.INTERACTIVE,
        "fast": ServiceClass.INTERACTIVE,
        "interactive": ServiceClass.INTERACTIVE,
        "flex": ServiceClass.BATCH,
        "batch": ServiceClass.BATCH,
    }
)
"""OpenAI's words for ``service_tier``, and our own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What a client said beside the prompt. The right types, any values; None: not said."""

    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None  # the newer name; it wins
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    logprobs: int | None = None  # how many of the best; None: no logprobs at all
    logprobs_field: str = "logprobs"  # what the client calls that number
    prompt_logprobs: int | None = None  # the same, of the prompt's tokens
    prompt_logprobs_field: str = "prompt_logprobs"
    repeats_prompt: bool = False  # so that an answer may have no token of its own
    user: str | None = None
    service_tier: str | None = None
    prompt_cache_retention: str | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    constraint: Constraint | None = None  # ``constraints.check`` compiles it
    constraint_field: str = ""  # what the client calls it


@dataclass(frozen=True, slots=True)
class Limits:
    """What this model and this gateway allow."""

    context_tokens: int
    vocab_size: int
    n_max: int


def call_of(
    parameters: Parameters,
    limits: Limits,
    *,
    call: str,
    prompt: tuple[int, ...],
    prompt_field: str,
    default_max_tokens: int | None,
    deadline_unix_ms: int,
    retries: int = 0,
    model: str = "",
    adapter: str | None = None,
    tenant: str | None = None,
    stream: bool = False,
) -> Call:
    """The call that a client's parameters and one prompt make.

    Args:
        model: as ``Call.model``.
        tenant: whose key was sent; it counts, whatever ``user`` says.
        stream: the answer is to be told while it comes; a beam search and ``best_of`` cannot be.

    Raises:
        InvalidField, PromptTooLong: the first thing that is out of bounds.
    """
    beams = beams_of(parameters, limits)
    best_of = None if beams else drawn_count(parameters, limits)
    sampling = sampling_of(parameters, limits)
    if beams and parameters.constraint is not None:
        raise ConflictingFields(
            parameters.constraint_field,
            "is not followed by a beam search; leave it out, or use_beam_search",
        )
    if stream and (beams or best_of):
        raise ConflictingFields(
            "use_beam_search" if beams else "best_of",
            "has its answers when all are complete, which cannot be streamed; set stream to false",
        )
    return Call(
        call=call,
        prompt=prompt,
        n=choice_count(parameters, limits),
        sampling=replace(sampling, temperature=0.0) if beams else sampling,
        stop=stop_of(
            parameters,
            limits,
            prompt_tokens=len(prompt),
            prompt_field=prompt_field,
            default_max_tokens=default_max_tokens,
        ),
        seed=seed_of(parameters),
        tenant=tenant_of(parameters.user) if tenant is None else tenant,
        service_class=service_class_of(parameters),
        deadline_unix_ms=deadline_unix_ms,
        retries=retries,
        skip_special_tokens=parameters.skip_special_tokens is not False,
        include_stop_string=bool(parameters.include_stop_str_in_output),
        prompt_field=prompt_field,
        model=model,
        adapter=adapter,
        beams=beams,
        best_of=best_of,
        pin_ms=pin_ms_of(parameters),
        task=scoring_of(parameters, limits, prompt_tokens=len(prompt)),
    )


def check_model(model: str | None, session: Session) -> str | None:
    """The adapter that ``model`` names; None for the base model, also where nothing is said.

    Raises:
        UnknownModel: it is neither.
    """
    if not model or model == session.model_name:
        return None
    if model in session.adapters:
        return model
    check_name(model)
    raise UnknownModel(model, session.model_name, *session.adapters)


def check_name(model: str) -> None:
    """Raises InvalidField where it is too long to be a model's name, and to be repeated."""
    if len(model) > MODEL_CHARACTERS_MAX:
        raise InvalidField(
            "model", f"has {len(model)} characters, at most {MODEL_CHARACTERS_MAX} are allowed"
        )


def choice_count(parameters: Parameters, limits: Limits) -> int:
    return _whole("n", parameters.n, 1, 1, limits.n_max)


def drawn_count(parameters: Parameters, limits: Limits) -> int | None:
    """How many choices are to be drawn for the ``n`` best of them; None: no more than ``n``."""
    n = choice_count(parameters, limits)
    if parameters.best_of is None or parameters.best_of == n:
        return None
    if parameters.best_of < n:
        raise ConflictingFields(
            "best_of", f"is {shown(parameters.best_of)}, must be at least n, {n}"
        )
    return _whole("best_of", parameters.best_of, n, n, limits.n_max)


def beams_of(parameters: Parameters, limits: Limits) -> Beams | None:
    """The beam search that is asked for; its width is ``best_of``, or ``n`` where that is not said.

    Raises:
        InvalidField: out of bounds, or what has no meaning with it, or without it.
    """
    p = parameters
    if not p.use_beam_search:
        for name, default in (("length_penalty", 1), ("early_stopping", False)):
            if getattr(p, name) not in (None, default):
                problem = f"is {shown(getattr(p, name))}, which needs use_beam_search to be true"
                raise ConflictingFields(name, problem)
        return None
    drawing = (("temperature", 0), ("top_p", 1), ("top_k", 0), ("min_p", 0))
    for name, off in drawing:
        value = getattr(p, name)
        if value not in (None, off) and (name, value) != ("top_k", -1):
            problem = f"is {shown(value)}, but a beam search draws nothing; leave it out"
            raise ConflictingFields(name, f"{problem} or set it to {off}")
    if p.early_stopping not in (None, False, True, "never"):
        raise InvalidField(
            "early_stopping", f'is {shown(p.early_stopping)}, must be true, false or "never"'
        )
    n = choice_count(p, limits)
    width = drawn_count(p, limits) or n
    if width > BEAM_WIDTH_MAX:
        name = "n" if p.best_of is None else "best_of"
        raise ConflictingFields(name, f"is {width}, at most {BEAM_WIDTH_MAX} beams are allowed")
    return Beams(
        width,
        n,
        length_penalty=_number(
            "length_penalty", p.length_penalty, 1.0, -LENGTH_PENALTY_MAX, LENGTH_PENALTY_MAX
        ),
        early_stopping=p.early_stopping is True,
    )


def seed_of(parameters: Parameters) -> int | None:
    """The seed as 63 bits without a sign, which is what travels; None: the session draws one."""
    if parameters.seed is None:
        return None
    return _whole("seed", parameters.seed, 0, SEED_MIN, SEED_MAX) % 2**63


def tenant_of(user: str | None) -> str:
    """Whom a request is for, by its ``user``."""
    user = user or DEFAULT_TENANT
    if len(user) > TENANT_CHARACTERS_MAX:
        raise InvalidField(
            "user", f"has {len(user)} characters, at most {TENANT_CHARACTERS_MAX} are allowed"
        )
    return user


def pin_ms_of(parameters: Parameters) -> int | None:
    """How long the prompt's blocks get a soft pin; None: not at all."""
    text = parameters.prompt_cache_retention
    if text is None or text in ("in_memory", "in-memory"):
        return None
    lifetime_ms = lifetime_ms_of(text)
    if lifetime_ms is None or lifetime_ms > PIN_MS_MAX:
        raise UnusableValue(
            "prompt_cache_retention",
            f"is {shown(text)}; in_memory or a time up to 24h, as 30m, will do",
        )
    return lifetime_ms


def service_class_of(parameters: Parameters) -> ServiceClass:
    tier = "auto" if parameters.service_tier is None else parameters.service_tier
    if tier not in SERVICE_TIERS:
        raise InvalidField(
            "service_tier", f"is {shown(tier)}, must be one of {', '.join(SERVICE_TIERS)}"
        )
    return SERVICE_TIERS[tier]


def sampling_of(parameters: Parameters, limits: Limits) -> Sampling:
    p = parameters
    top_k = _whole("top_k", p.top_k, 0, -1, TOP_K_MAX)
    return Sampling(
        temperature=_number("temperature", p.temperature, 1.0, 0.0, 2.0),
        top_k=max(top_k, 0),  # -1 is another way to say off
        top_p=_number("top_p", p.top_p, 1.0, 0.0, 1.0, above=True),
        min_p=_number("min_p", p.min_p, 0.0, 0.0, 1.0),
        repetition_penalty=_number(
            "repetition_penalty", p.repetition_penalty, 1.0, 0.0, 10.0, above=True
        ),
        presence_penalty=_number("presence_penalty", p.presence_penalty, 0.0, -2.0, 2.0),
        frequency_penalty=_number("frequency_penalty", p.frequency_penalty, 0.0, -2.0, 2.0),
        logit_bias=_logit_bias(p.logit_bias, limits.vocab_size),
        logprobs=None
        if p.logprobs is None
        else _whole(p.logprobs_field, p.logprobs, 0, 0, min(LOGPROBS_MAX, limits.vocab_size)),
        no_repeat_ngram_size=_whole(
            "no_repeat_ngram_size", p.no_repeat_ngram_size, 0, 0, NO_REPEAT_NGRAM_SIZE_MAX
        ),
        constraint=p.constraint,
    )


def scoring_of(parameters: Parameters, limits: Limits, *, prompt_tokens: int) -> Scoring | None:
    """Whether the prompt's own tokens are to be scored, and with how many of the best."""
    if parameters.prompt_logprobs is None:
        return None
    name = parameters.prompt_logprobs_field
    most = min(LOGPROBS_MAX, limits.vocab_size)
    task = Scoring(_whole(name, parameters.prompt_logprobs, 0, 0, most))
    check_scores(name, prompt_tokens, task)
    return task


def check_scores(name: str, prompt_tokens: int, task: Scoring) -> None:
    """Raises ConflictingFields where an answer with all of them would be too large."""
    count = prompt_tokens * (1 + task.top)
    if count > SCORES_MAX:
        raise ConflictingFields(
            name,
            f"is {task.top}, which makes {count} log-probabilities of {prompt_tokens} prompt "
            f"tokens, at most {SCORES_MAX} pass; ask for fewer, or for fewer tokens at once",
        )


def truncated(tokens: tuple[int, ...], count: int | None, limits: Limits) -> tuple[int, ...]:
    """The last ``count`` tokens, vLLM's ``truncate_prompt_tokens``; -1: as many as the context
    has room for, with one token more."""
    most = limits.context_tokens - 1
    if count is None:
        return tokens
    if count != -1 and not 1 <= count <= most:
        raise InvalidField(
            "truncate_prompt_tokens", f"is {shown(count)}, must be -1 or from 1 to {most}"
        )
    return tokens[-(most if count == -1 else count) :]


def stop_of(
    parameters: Parameters,
    limits: Limits,
    *,
    prompt_tokens: int,
    prompt_field: str,
    default_max_tokens: int | None,
) -> Stop:
    """When the request ends; ``default_max_tokens`` None: when the context is full.

    Raises:
        PromptTooLong: the context has no room for one more token.
        InvalidField: also where more tokens are asked for than the context could ever hold.
            More than it holds beside this prompt is fine: the answer ends with ``length``.
    """
    room_tokens = limits.context_tokens - prompt_tokens
    if room_tokens < 1:
        raise PromptTooLong(prompt_tokens, limits.context_tokens, field=prompt_field)
    name = "max_tokens" if parameters.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = min(
        room_tokens,
        _whole(
            name,
            getattr(parameters, name),
            default_max_tokens or room_tokens,
            0 if parameters.repeats_prompt else 1,
            limits.context_tokens,
        ),
    )
    min_tokens = _whole("min_tokens", parameters.min_tokens, 0, 0, limits.context_tokens)
    if min_tokens > max_tokens:
        raise ConflictingFields(
            "min_tokens", f"is {min_tokens}, and {max_tokens} tokens are generated at most"
        )
    return Stop(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=bool(parameters.ignore_eos),
        token_ids=_stop_tokens(parameters.stop_token_ids, limits.vocab_size),
        strings=_stop_strings(parameters.stop),
    )


def check_tokens(name: str, tokens: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidField naming the first one that the model does not have."""
    if not tokens or (min(tokens) >= 0 and max(tokens) < vocab_size):
        return
    index = next(i for i, token in enumerate(tokens) if not 0 <= token < vocab_size)
    raise InvalidField(
        f"{name}.{index}",
        f"is token id {shown(tokens[index])}, must be from 0 to {vocab_size - 1}",
    )


def shown(value: object) -> str:
    """A client's value in a message: quoted, plain ASCII, and never long."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return f"a number of {value.bit_length()} bits"
    text = ascii(value[:SHOWN_CHARACTERS_MAX] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN_CHARACTERS_MAX else text[:SHOWN_CHARACTERS_MAX] + "…"


def _whole(name: str, value: int | None, default: int, low: int, high: int) -> int:
    if value is None:
        return default
    if not low <= value <= high:
        raise InvalidField(name, f"is {shown(value)}, must be from {low} to {high}")
    return value


def _number(
    name: str, value: float | None, default: float, low: float, high: float, *, above: bool = False
) -> float:
    """``value``, checked to be in [low, high], or in (low, high] with ``above``."""
    if value is None:
        return default
    if not low <= value <= high or (above and value == low):
        lowest = f"above {low:g}" if above else f"from {low:g}"
        raise InvalidField(name, f"is {shown(value)}, must be {lowest} to {high:g}")
    return float(value)


def _logit_bias(bias: Mapping[int, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    if len(bias) > LOGIT_BIAS_MAX:
        raise InvalidField(
            "logit_bias", f"has {len(bias)} entries, at most {LOGIT_BIAS_MAX} are allowed"
        )
    for token, value in bias.items():
        if not 0 <= token < vocab_size:
            raise InvalidField(
                "logit_bias", f"token id {shown(token)} must be from 0 to {vocab_size - 1}"
            )
        if not -100 <= value <= 100:
            raise InvalidField(
                "logit_bias", f"of token {token} is {shown(value)}, must be from -100 to 100"
            )
    return tuple(sorted((token, float(value)) for token, value in bias.items()))


def _stop_tokens(tokens: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    if len(tokens) > STOP_TOKENS_MAX:
        raise InvalidField(
            "stop_token_ids", f"has {len(tokens)} entries, at most {STOP_TOKENS_MAX} are allowed"
        )
    check_tokens("stop_token_ids", tokens, vocab_size)
    return tuple(tokens)


def _stop_strings(strings: Sequence[str]) -> tuple[str, ...]:
    if len(strings) > STOP_STRINGS_MAX:
        raise InvalidField(
            "stop", f"has {len(strings)} strings, at most {STOP_STRINGS_MAX} are allowed"
        )
    for index, string in enumerate(strings):
        if not 1 <= len(string) <= STOP_STRING_CHARACTERS_MAX:
            raise InvalidField(
                f"stop.{index}",
                f"has {len(string)} characters, must have from 1 to {STOP_STRING_CHARACTERS_MAX}",
            )
    return tuple(strings)
