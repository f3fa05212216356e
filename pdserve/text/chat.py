"""Chat messages to the one text that the model was trained to continue.

A model brings its template, a Jinja program from a stranger: it runs in Jinja's immutable sandbox,
sees the messages and a few helpers, and reaches nothing else. The helpers are those that templates
on the model hub expect: ``raise_exception``, ``strftime_now``, ``tojson`` without escapes, and loop
controls. A template refuses messages by raising; that is the client's mistake, not ours.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pdserve.errors import ConfigError, InvalidField, UnusableValue
from pdserve.text.tokenizer import Tokenizer
from pdserve.text.tool_prompt import has_tools, written_out

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""For models that bring no template; the most widespread one."""

_TEMPLATE_FAILURES = (
    jinja2.TemplateError,  # raise_exception, an undefined field, a sandbox violation
    TypeError,  # '...' + None
    ValueError,
    LookupError,
    ArithmeticError,  # OverflowError: the sandbox bounds range()
    RecursionError,
)


class ChatTemplate:
    """A compiled template. Immutable; threads may share it.

    Args:
        now: what ``strftime_now`` reads; another clock makes tests repeatable.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str,
        eos_token: str,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda layout: now().strftime(layout)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the model's chat template, line {error.lineno}: {error.message}; put one that "
                "can be used into chat_template.jinja beside the model"
            ) from error
        self._knows_tools = "tools" in source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt.

        Args:
            arguments: what this model's template knows beside, such as ``enable_thinking``; a
                template ignores what it does not know.

        Raises:
            InvalidField: there are no messages, the template refuses them, or an argument has the
                name of something that is given already.
        """
        if not messages:
            raise InvalidField("messages", "is empty, must hold at least one message")
        if not self._knows_tools and (tools or any(map(has_tools, messages))):
            messages, tools = written_out(messages, tools), None
        given = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
        }
        for name in arguments or {}:
            if name in given:
                raise UnusableValue(
                    f"chat_template_kwargs.{name}",
                    "is given to every template already; leave it out, and use the request's own "
                    "field where it has one",
                )
        try:
            return self._template.render({**given, **(arguments or {})})
        except _TEMPLATE_FAILURES as error:
            raise UnusableValue(
                "messages", f"the model's chat template does not take them: {error}"
            ) from error


def chat_template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """The model's own template, or ChatML when it brings none."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_ids
    return ChatTemplate(
        CHATML if tokenizer.chat_template is None else tokenizer.chat_template,
        bos_token="" if bos is None else tokenizer.token_text(bos),
        eos_token=tokenizer.token_text(eos[0]) if eos else "",
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent)
