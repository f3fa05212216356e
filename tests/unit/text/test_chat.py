import json
from datetime import datetime
from typing import Any

import pytest

from pdserve.errors import ConfigError, InvalidField
from pdserve.text.chat import CHATML, ChatTemplate, chat_template_of
from pdserve.text.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "hello"}]


def rendered(source: str, **arguments: object) -> str:
    template = ChatTemplate(
        source, bos_token="<s>", eos_token="</s>", now=lambda: datetime(2024, 2, 29)
    )
    return template.render(HELLO, **arguments)  # type: ignore[arg-type]


def test_the_default_models_template(smollm: Tokenizer) -> None:
    text = chat_template_of(smollm).render(HELLO)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm.encode(text)[0] == 1


def test_a_model_without_template_gets_chatml(small: Tokenizer) -> None:
    bare = Tokenizer(small.hf, eos_token_ids=(), bos_token_id=None, chat_template=None)
    template = chat_template_of(bare)
    assert template.render(HELLO) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    without_prompt = template.render(HELLO, add_generation_prompt=False)
    assert without_prompt == "<|im_start|>user\nhello<|im_end|>\n"


def test_the_models_own_template_knows_its_tokens(small: Tokenizer) -> None:
    assert chat_template_of(small).render(HELLO) == "hello<|end|>"


def test_helpers_that_templates_expect() -> None:
    assert rendered("{{ strftime_now('%d %B %Y') }}") == "29 February 2024"
    assert rendered("{{ {'é': '<b>'} | tojson }}") == '{"é": "<b>"}'
    assert rendered("{{ [1] | tojson(indent=1) }}") == "[\n 1\n]"
    assert rendered("{{ bos_token }}{{ eos_token }}") == "<s></s>"
    assert (
        rendered("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "01"
    )


def test_blocks_leave_no_space_behind() -> None:
    assert rendered("  {% if true %}\na\n  {% endif %}\nb") == "a\nb"


def test_tools_reach_the_template() -> None:
    assert rendered("{{ tools is none }}") == "True"
    assert rendered("{{ tools[0]['name'] }}", tools=[{"name": "f"}]) == "f"


def test_arguments_reach_the_template_and_replace_nothing() -> None:
    source = "{{ enable_thinking is defined and enable_thinking is false }}"
    assert rendered(source) == "False"
    assert rendered(source, arguments={"enable_thinking": False, "unheard_of": 1}) == "True"
    for name in ("messages", "tools", "bos_token", "add_generation_prompt"):
        with pytest.raises(InvalidField, match="given to every template") as caught:
            rendered(source, arguments={name: None})
        assert caught.value.field == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['no such field'] + 'x' }}",
        "{{ 'x' + messages }}",
        "{{ 1 // 0 }}",
        "{{ messages[5]['role'] }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ none.x.y }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_what_a_template_refuses_is_the_clients_mistake(source: str) -> None:
    with pytest.raises(InvalidField, match="messages: the model's chat template") as caught:
        rendered(source)
    assert caught.value.field == "messages"


def test_the_template_says_why() -> None:
    with pytest.raises(InvalidField, match="roles must alternate"):
        rendered("{{ raise_exception('roles must alternate') }}")


def test_no_messages_are_refused() -> None:
    template = ChatTemplate("x", bos_token="", eos_token="")
    with pytest.raises(InvalidField, match="messages: is empty"):
        template.render([])


def test_a_template_that_is_no_jinja_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="line 2"):
        ChatTemplate("a\n{% if %}", bos_token="", eos_token="")


def test_a_template_that_knows_no_tools_gets_them_in_words() -> None:
    template = ChatTemplate(CHATML, bos_token="", eos_token="")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    tool = {"type": "function", "function": {"name": "f"}}
    told = template.render(messages, tools=[tool])
    assert told.startswith("<|im_start|>system\nYou may call one or more functions")
    assert f"<tools>\n{json.dumps(tool)}\n</tools>" in told
    assert '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in told
    assert "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>" in told
    system = [{"role": "system", "content": "Be brief."}, *messages]
    assert template.render(system, tools=[tool]).startswith("<|im_start|>system\nBe brief.\n\nYou")


def test_a_template_that_knows_tools_writes_them_itself() -> None:
    source = "{{ tools | tojson }}{% for m in messages %}{{ m.tool_calls | tojson }}{% endfor %}"
    template = ChatTemplate(source, bos_token="", eos_token="")
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    assert template.render([message], tools=[{"a": 1}]) == (
        '[{"a": 1}][{"function": {"name": "f"}}]'
    )
