"""The body of ``/v1/decisions``, as OpenAI and vLLM have it, and what the model is asked.

The questions stand behind the input, each in a prompt of its own, at the end of the last message of
the user. So all prompts of a request begin with the whole input. Fields that nobody knows are
refused here: a misspelt one would change an answer that has no text to show it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, ValidationError

from pdserve.cluster.gateway.parameters import shown
from pdserve.cluster.gateway.prompts import joined_text
from pdserve.cluster.http.decisions.labels import Label, UnclearLabels, Value, labels_of
from pdserve.cluster.http.responses.items import items_of, messages_of
from pdserve.cluster.http.schemas import Body, checked, reason_of
from pdserve.errors import ConflictingFields, InvalidField, UnusableValue

QUESTIONS_MAX = 200
CHOICES_MIN, CHOICES_MAX = 2, 255
LEVELS_MIN, LEVELS_MAX = 2, 10
NAME_CHARACTERS_MAX = 256
LABEL_CHARACTERS_MAX = 256
PREDICATE: tuple[Value, ...] = ("yes", "no")

Encode = Callable[[str], Sequence[int]]


class DecisionBody(Body):
    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    input: Any  # checked by ``messages_before``
    questions: Annotated[list[Any], Field(min_length=1, max_length=QUESTIONS_MAX)]
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    user: str | None = None
    service_tier: str | None = None


def decision_body(tree: Mapping[str, Any]) -> DecisionBody:
    """
    Raises:
        InvalidField: also for a field that nobody knows.
    """
    for name in tree:
        if name not in DecisionBody.model_fields:
            raise InvalidField(_named(name), "is not known here; leave it out")
    return checked(DecisionBody, tree)


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Choice(_Part):
    value: Annotated[StrictStr, Field(min_length=1, max_length=LABEL_CHARACTERS_MAX)] | StrictBool
    description: str | None = None


class _Level(_Part):
    label: str = Field(min_length=1, max_length=LABEL_CHARACTERS_MAX)
    description: str | None = None


class _Question(_Part):
    name: str | None = Field(None, max_length=NAME_CHARACTERS_MAX)
    instructions: Any  # text, or parts of it


class _Predicate(_Question):
    type: Literal["predicate"]


class _ChoiceQuestion(_Question):
    type: Literal["choice"]
    choices: list[_Choice] = Field(min_length=CHOICES_MIN, max_length=CHOICES_MAX)


class _ScoreQuestion(_Question):
    type: Literal["score"]
    levels: list[_Level] = Field(min_length=LEVELS_MIN, max_length=LEVELS_MAX)


_KINDS: Mapping[str, type[_Question]] = MappingProxyType(
    {"predicate": _Predicate, "choice": _ChoiceQuestion, "score": _ScoreQuestion}
)


@dataclass(frozen=True, slots=True)
class Question:
    kind: str
    name: str | None
    values: tuple[Value, ...]
    labels: tuple[Label, ...]  # of the values, in their order
    text: str  # what the model is asked


def questions_of(given: Sequence[Any], encode: Encode) -> list[Question]:
    """
    Args:
        encode: a label's text to token ids.

    Raises:
        InvalidField: naming the question, and what of it cannot be used.
        ConflictingFields: two of its answers are the same.
    """
    return [_question(f"questions.{index}", each, encode) for index, each in enumerate(given)]


def messages_before(said: Any) -> list[dict[str, Any]]:
    """The field ``input`` as messages of a chat.

    Raises:
        InvalidField: naming the item that cannot be used.
    """
    if isinstance(said, list):
        said = [_with_json_as_text(f"input.{index}", item) for index, item in enumerate(said)]
    return messages_of(items_of(said))


def with_question(
    messages: Sequence[Mapping[str, Any]], question: Question
) -> list[Mapping[str, Any]]:
    """The messages with the question at their end. Templates want turns to alternate, so it joins
    the user's last turn."""
    *before, last = messages
    if last["role"] == "user":
        return [*before, {**last, "content": f"{last['content']}\n\n{question.text}"}]
    return [*messages, {"role": "user", "content": question.text}]


def _question(where: str, given: Any, encode: Encode) -> Question:
    kind = given.get("type") if isinstance(given, Mapping) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InvalidField(f"{where}.type", f"is {shown(kind)}, must be one of {', '.join(_KINDS)}")
    try:
        question = _KINDS[kind].model_validate(given)
    except ValidationError as error:
        raise _problem(where, error) from None
    asked = text_of(f"{where}.instructions", question.instructions)
    if not asked:
        raise UnusableValue(f"{where}.instructions", "is empty, must ask something")
    values, told = _answers(question)
    try:
        labels = labels_of(values, encode)
    except UnclearLabels as error:
        place = {"choice": "choices", "score": "levels"}.get(kind, "type")
        raise ConflictingFields(
            f"{where}.{place}.{error.index}",
            f"is {shown(values[error.index])}, which is no answer of its own beside the others",
        ) from None
    return Question(kind, question.name, values, tuple(labels), _text(kind, asked, labels, told))


def _answers(question: _Question) -> tuple[tuple[Value, ...], list[str | None]]:
    """What may be answered, and what is said about each."""
    match question:
        case _ChoiceQuestion():
            options = question.choices
            return tuple(each.value for each in options), [each.description for each in options]
        case _ScoreQuestion():
            levels = question.levels
            return tuple(each.label for each in levels), [each.description for each in levels]
        case _:
            return PREDICATE, [None] * len(PREDICATE)


def _text(
    kind: str, asked: str, labels: Sequence[Label], descriptions: Sequence[str | None]
) -> str:
    if kind == "predicate":
        return f"{asked}\nAnswer with yes or no, and nothing else."
    how = {
        "choice": "Answer with one of these, and nothing else:",
        "score": "Answer with one of these levels, the lowest first, and nothing else:",
    }[kind]
    listed = [
        f"- {label.text}: {said}" if said else f"- {label.text}"
        for label, said in zip(labels, descriptions, strict=True)
    ]
    return "\n".join([asked, how, *listed])


def text_of(where: str, said: Any) -> str:
    """A text, or parts of it: ``input_text`` as it is, ``input_json`` written out.

    Raises:
        InvalidField
    """
    return joined_text(where, said, _part)


def _part(where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else part
    if kind == "input_text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "input_json" and isinstance(part.get("data"), dict | list):
        return _compact(part["data"])
    raise InvalidField(
        where, f"is of type {shown(kind)}, must be input_text with text or input_json with data"
    )


def _with_json_as_text(where: str, item: Any) -> Any:
    """An item whose parts of JSON are text."""
    content = item.get("content") if isinstance(item, Mapping) else None
    if not isinstance(content, list):
        return item
    parts = [
        {"type": "input_text", "text": _part(f"{where}.content.{index}", part)}
        if isinstance(part, Mapping) and part.get("type") == "input_json"
        else part
        for index, part in enumerate(content)
    ]
    return {**item, "content": parts}


def _compact(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


_PARTS: tuple[type[BaseModel], ...] = (*_KINDS.values(), _Choice, _Level)
_FIELDS = {name for part in _PARTS for name in part.model_fields}


def _problem(where: str, error: ValidationError) -> InvalidField:
    """The first field at fault, by its way through the question, without the names that pydantic
    has for the members of a union."""
    first = error.errors(include_url=False, include_context=False, include_input=True)[0]
    extra = first["type"] == "extra_forbidden"
    path = [
        str(part)
        for index, part in enumerate(first["loc"])
        if isinstance(part, int) or part in _FIELDS or (extra and index == len(first["loc"]) - 1)
    ]
    field = ".".join([where, *map(_named, path)])
    if first["type"] == "missing":
        return InvalidField(field, "is missing")
    if extra:
        return InvalidField(field, "is not known here; leave it out")
    return InvalidField(field, f"is {shown(first['input'])}: {reason_of(first)}")


def _named(name: str) -> str:
    """A client's name of a field, as one may write it into an answer."""
    return shown(name).strip("'\"")
