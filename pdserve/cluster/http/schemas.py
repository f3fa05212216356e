"""The request bodies: which fields there are, of which type, and which of them we refuse.

Types are checked here, strictly (no text for a number, no true for 1); values in
``gateway.parameters``. ``null`` means "not said" for every optional field. A field that
nobody knows is accepted and ignored, as clients send extras of many servers. A known field whose
effect we do not have is refused by ``UNSUPPORTED`` where its value would change the answer: a
*constraint* that is silently dropped is a wrong answer; a mere hint is not.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from pdserve.cluster.gateway.constraints import Wanted, constraint_of
from pdserve.cluster.gateway.parameters import Parameters, shown
from pdserve.errors import ConflictingFields, InvalidField

Texts = Annotated[list[str], Field(fail_fast=True)]
Tokens = Annotated[list[int], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
# Checked by hand: a union of four lists would try each of them on every element.
Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str | None = None

    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = MappingProxyType({})
    """What one API has beside ``UNSUPPORTED``."""


class Extension(BaseModel):
    """Ours, under a name of our own."""

    model_config = ConfigDict(strict=True)

    why: bool | None = Field(None, description="Say which decisions the router took, and why.")


class _Generation(Body):
    """What both kinds of completion take."""

    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    include_timing: bool | None = Field(None, description="Ours: say where the time went.")
    pdserve: Extension | None = None

    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=100_000)
    seed: int | None = None
    stop: str | Texts | None = None
    stop_token_ids: Tokens | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    user: str | None = None
    service_tier: str | None = None
    prompt_cache_retention: str | None = None
    priority: int | None = Field(None, description="Ignored; see service_tier.")
    prompt_logprobs: int | None = Field(
        None, description="How many of the best in place of each prompt token, with its own."
    )
    truncate_prompt_tokens: int | None = Field(
        None, description="Take the prompt's last so many tokens; -1: what the context holds."
    )
    best_of: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None

    # Checked by ``constraint_of``, which names what is wrong within them.
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None

    def parameters(self, required: Wanted | None = None) -> Parameters:
        """``required``: what the answer must be already."""
        wanted = constraint_of(vars(self))
        if required is not None and wanted is not None:
            raise ConflictingFields(
                wanted.field, "comes beside a required call of a tool; an answer is one of them"
            )
        wanted = wanted or required
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        return Parameters(
            n=self.n,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            logit_bias=_token_keys(self.logit_bias or {}),
            seed=self.seed,
            stop=stop,
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            user=self.user,
            service_tier=self.service_tier,
            prompt_cache_retention=self.prompt_cache_retention,
            best_of=self.best_of,
            use_beam_search=self.use_beam_search,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            prompt_logprobs=self._prompt_logprobs(),
            constraint=wanted.constraint if wanted else None,
            constraint_field=wanted.field if wanted else "",
            **self._own_parameters(),
        )

    def _own_parameters(self) -> dict[str, Any]:
        raise NotImplementedError

    def _prompt_logprobs(self) -> int | None:
        if self.prompt_logprobs is not None and self.stream:
            raise ConflictingFields(
                "prompt_logprobs", "come with a whole answer only; set stream to false"
            )
        return self.prompt_logprobs

    def usage_wanted(self) -> tuple[bool, bool]:
        """Whether the stream ends with a usage chunk, and whether every chunk has one."""
        options = self.stream_options or {}
        if options and not self.stream:
            raise ConflictingFields("stream_options", "is for streams only; set stream to true")
        wanted = []
        for name in ("include_usage", "continuous_usage_stats"):
            value = options.get(name)
            if value is not None and not isinstance(value, bool):
                raise InvalidField(
                    f"stream_options.{name}", f"is {shown(value)}, must be true or false"
                )
            wanted.append(bool(value))
        return wanted[0], wanted[1]


class ChatBody(_Generation):
    messages: Annotated[list[Any], Field(fail_fast=True)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    tools: Objects | None = None
    tool_choice: Any = None  # this and the next: checked by ``tools_of``
    parallel_tool_calls: Any = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="For the model's chat template, such as enable_thinking."
    )

    def _own_parameters(self) -> dict[str, Any]:
        if self.top_logprobs is not None and not self.logprobs:
            raise ConflictingFields("top_logprobs", "needs logprobs to be true")
        return {
            "max_completion_tokens": self.max_completion_tokens,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "logprobs_field": "top_logprobs",
        }


class CompletionBody(_Generation):
    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None

    def _own_parameters(self) -> dict[str, Any]:
        if self.max_tokens == 0 and not self.echo:
            raise ConflictingFields(
                "max_tokens", "is 0, which leaves nothing to answer; set echo to true, or ask for 1"
            )
        return {"logprobs": self.logprobs, "repeats_prompt": bool(self.echo)}

    def _prompt_logprobs(self) -> int | None:
        """An echo with logprobs has those of the prompt too."""
        own = super()._prompt_logprobs()
        if self.echo and self.logprobs is not None:
            return max(self.logprobs, own or 0)
        return own


class EmbeddingBody(Body):
    input: Prompt
    encoding_format: str | None = None
    dimensions: int | None = Field(
        None, description="Keep the first so many numbers, brought to length 1 again."
    )
    user: str | None = None
    service_tier: str | None = None
    priority: int | None = Field(None, description="Ignored; see service_tier.")
    truncate_prompt_tokens: int | None = Field(
        None, description="Take the last so many tokens of each input; -1: what fits."
    )
    add_special_tokens: bool | None = None
    normalize: bool | None = Field(None, description="To length 1; true.")
    use_activation: bool | None = Field(None, description="vLLM's newer name of normalize.")


class TokenizeBody(Body):
    """One of prompt, prompt_token_ids and messages. ``return_block_keys``: what the store calls its
    full blocks, for this model and user, in hexadecimal."""

    prompt: str | None = None
    prompt_token_ids: Tokens | None = None
    messages: Annotated[list[Any], Field(fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None
    return_block_keys: bool | None = None
    user: str | None = None


class DetokenizeBody(Body):
    tokens: Tokens


_NOTHING: Sequence[Any] = (False, "", [], {})

UNSUPPORTED: Mapping[str, Sequence[Any]] = MappingProxyType(
    {
        "tool_choice": ("none", "auto"),  # completions only: chats have the field
        "functions": _NOTHING,
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": _NOTHING,
        "web_search_options": (),
        "suffix": _NOTHING,
        "logprob_token_ids": _NOTHING,
        "allowed_token_ids": (),
        "bad_words": _NOTHING,
        "continue_final_message": _NOTHING,
        "chat_template": (),
        "chat_template_kwargs": _NOTHING,  # completions only: chats have the field
        "documents": _NOTHING,
        "spaces_between_special_tokens": (True,),
        "thinking_token_budget": (),
        "repetition_detection": _NOTHING,
        "return_tokens_as_token_ids": _NOTHING,
        "echo": _NOTHING,  # chats only: completions have the field
        "add_special_tokens": _NOTHING,  # likewise: a chat template writes them itself
        "cache_salt": _NOTHING,
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
        "kv_transfer_params": _NOTHING,
    }
)
"""Fields whose effect we do not have, and which of their values beside null ask for none of it."""

_TOKEN_KEY = re.compile(r"0|[1-9][0-9]{0,9}")

BodyType = TypeVar("BodyType", bound=Body)


def checked(kind: type[BodyType], tree: Mapping[str, Any]) -> BodyType:
    """``tree`` as a body of ``kind``.

    Raises:
        InvalidField: naming the path to the first value of a wrong type, or an unsupported field.
    """
    unsupported = unsupported_in(kind)
    said = () if unsupported.keys().isdisjoint(tree) else unsupported.items()
    for name, harmless in said:
        value = tree.get(name)
        if value is None:
            continue
        if not any(type(value) is type(one) and value == one for one in harmless):
            raise InvalidField(
                name, f"is {shown(value)}, which this server does not support; leave it out"
            )
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _first_problem(error) from None


@functools.cache
def unsupported_in(kind: type[Body]) -> Mapping[str, Sequence[Any]]:
    """Fields of ``kind`` that are refused, and with which values they are not."""
    known = {**UNSUPPORTED, **kind.unsupported}
    return {name: ok for name, ok in known.items() if name not in kind.model_fields}


def prompts_of(prompt: Any, *, name: str = "prompt") -> list[str | list[int]]:
    """The single prompts that a completion's ``prompt``, or what ``name`` says, holds, in order."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise InvalidField(
            name, f"is {shown(prompt)}, must be text, token ids, or a list of either"
        )
    if _is_token(prompt[0]):
        return [_tokens(name, prompt)]
    return [
        item if isinstance(item, str) else _tokens(f"{name}.{index}", item)
        for index, item in enumerate(prompt)
    ]


def _tokens(where: str, items: Any) -> list[int]:
    if not isinstance(items, list):
        raise InvalidField(where, f"is {shown(items)}, must be text or a list of token ids")
    for index, item in enumerate(items):
        if not _is_token(item):
            raise InvalidField(f"{where}.{index}", f"is {shown(item)}, must be a token id")
    return items


def _is_token(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _token_keys(bias: Mapping[str, float]) -> dict[int, float]:
    for key in bias:
        if not _TOKEN_KEY.fullmatch(key):
            raise InvalidField("logit_bias", f"has the key {shown(key)}, must be a token id")
    return {int(key): value for key, value in bias.items()}


def _first_problem(error: ValidationError) -> InvalidField:
    """The first field at fault. A union reports each of its types; the deepest one came closest."""
    problems = error.errors(include_url=False, include_context=False, include_input=True)
    field = problems[0]["loc"][0] if problems[0]["loc"] else "body"
    same = [problem for problem in problems if problem["loc"][:1] == (field,)]
    deepest = max(same, key=lambda problem: len(_path(problem["loc"])))
    path = _path(deepest["loc"])
    where = ".".join(map(str, path))
    if deepest["type"] == "missing":
        return InvalidField(where, "is missing")
    reasons = dict.fromkeys(reason_of(p) for p in same if _path(p["loc"]) == path)
    return InvalidField(where, f"is {shown(deepest['input'])}: {' or '.join(reasons)}")


def reason_of(problem: Mapping[str, object]) -> str:
    """Pydantic's, without the names of our classes."""
    if problem["type"] in ("model_type", "model_attributes_type", "dataclass_type"):
        return "Input should be an object"
    return str(problem["msg"])


def _path(location: Sequence[str | int]) -> list[str | int]:
    """The way to the value: the field and indices, without pydantic's names for union members."""
    return [location[0], *(part for part in location[1:] if isinstance(part, int))]
