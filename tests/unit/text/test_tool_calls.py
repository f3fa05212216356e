"""Calls of tools in a model's text: told as they come, and nothing that is no call is lost."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pdserve.text import tool_calls
from pdserve.text.tool_calls import Style, ToolCallParser

STYLES: tuple[Style, ...] = ("hermes", "llama3_json", "required")

OSLO = '{"name": "weather", "arguments": {"city": "Oslo"}}'
TIME = '{"arguments": {"zone": [1, {"a": "}\\""}]}, "name": "time"}'


def read(style: Style, *pieces: str) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls, put together from what is told of the pieces."""
    parser = ToolCallParser(style)
    content, calls = "", list[tuple[str, str]]()
    for told in [*(parser.push(piece) for piece in pieces), parser.flush()]:
        content += told.content
        for delta in told.calls:
            if delta.name is not None:
                assert delta.index == len(calls), "calls are told in order, each begun once"
                calls.append((delta.name, delta.arguments))
            else:
                assert delta.index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
    assert parser.has_calls == bool(calls)
    return content, calls


@pytest.mark.parametrize(
    ("style", "text", "content", "calls"),
    [
        ("hermes", f"<tool_call>\n{OSLO}\n</tool_call>", "", ["weather"]),
        ("hermes", f"Let me see.\n<tool_call>{OSLO}</tool_call>", "Let me see.", ["weather"]),
        (
            "hermes",
            f"<tool_call>{OSLO}</tool_call>\n<tool_call>{TIME}</tool_call>\n",
            "",
            ["weather", "time"],
        ),
        ("hermes", f"<tool_call>{OSLO}</tool_call> Done.", " Done.", ["weather"]),
        ("hermes", f"<tool_call>{OSLO}", "", ["weather"]),  # the end tag is not the client's loss
        ("hermes", OSLO, OSLO, []),
        ("hermes", "a < b, <tool", "a < b, <tool", []),
        ("llama3_json", OSLO, "", ["weather"]),
        ("llama3_json", f"<|python_tag|>{OSLO}; {TIME}", "", ["weather", "time"]),
        ("llama3_json", f"It is {OSLO}", f"It is {OSLO}", []),
        ("llama3_json", '{"answer": 4}', '{"answer": 4}', []),
        ("required", f"[{OSLO}, {TIME}]", "", ["weather", "time"]),
    ],
)
def test_calls_and_content_are_told_apart(
    style: Style, text: str, content: str, calls: list[str]
) -> None:
    told, found = read(style, text)
    assert told == content
    assert [name for name, _ in found] == calls
    arguments = {"weather": {"city": "Oslo"}, "time": {"zone": [1, {"a": '}"'}]}}
    for name, said in found:
        assert json.loads(said) == arguments[name]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>no object</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": 4, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "weath',
        '<tool_call>{"name" "weather"}',
        '<tool_call>{"name": }</tool_call>',
        "<tool_call>[]</tool_call>",
    ],
)
def test_what_is_no_call_stays_content(text: str) -> None:
    assert read("hermes", text) == (text, [])


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "parameters": {"a": 1}}', '{"a": 1}'),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),  # written into a string
        ('{"name": "f", "arguments": null}', "null"),
        ('{"type": "function", "name": "f", "arguments": {}}', "{}"),
        ('{"name": "f", "arguments": {"cut": "of', '{"cut": "of'),
    ],
)
def test_arguments_are_the_model_s_own_text(text: str, arguments: str) -> None:
    assert read("hermes", f"<tool_call>{text}") == ("", [("f", arguments)])


def test_a_call_is_told_before_it_is_whole() -> None:
    parser = ToolCallParser("hermes")
    assert parser.push('<tool_call>{"name": "f"').calls[0].name == "f"
    assert parser.push(', "arguments": {"a').calls[0].arguments == '{"a'


def test_calls_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_calls, "CALLS_MAX", 2)
    one = f"<tool_call>{OSLO}</tool_call>"
    content, calls = read("hermes", one * 3)
    assert (content, len(calls)) == (one, 2)


FRAGMENTS = st.lists(
    st.sampled_from(
        [
            *("<tool_call>", "</tool_call>", "<|python_tag|>", OSLO, TIME, '{"name": "f"}'),
            *("[", "]", ",", ";", " ", "\n", "text", "{", "}", '"', "\\", "<"),
            '{"name": "f", "arguments": "x"}',
        ]
    ),
    max_size=8,
).map("".join)


@given(style=st.sampled_from(STYLES), text=FRAGMENTS, data=st.data())
@example(style="hermes", text=f"a <tool_call>{OSLO}</tool_call> b", data=None)
def test_what_is_told_does_not_depend_on_the_cuts(style: Style, text: str, data: Any) -> None:
    whole = read(style, text)
    assert read(style, *text) == whole
    if data is not None:
        cut = data.draw(st.integers(0, len(text)))
        assert read(style, text[:cut], text[cut:]) == whole


@given(text=st.text(alphabet="ab <>{}\n\"'", max_size=60))
def test_text_without_calls_comes_out_as_it_went_in(text: str) -> None:
    for style in ("hermes", "llama3_json"):
        assert read(style, text) == (text, [])
