"""Tools in chat completions: what reaches the model, what its calls become, what is refused."""

import json
from typing import Any

import jsonschema
import pytest

from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig
from pdserve.messages import FinishReason
from tests.unit.cluster.asgi import Reply, post
from tests.unit.cluster.fake_session import FakeSession, said

CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}},
            "required": ["city"],
            "$defs": {"City": {"enum": ["Oslo", "Rome"]}},
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
ASK = {"messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER, TIME]}
OSLO = '{"name": "weather", "arguments": {"city": "Oslo"}}'
NAMED = {"type": "function", "function": {"name": "weather"}}


def asked(
    *texts: str,
    finish: FinishReason = FinishReason.STOP,
    config: GatewayConfig | None = None,
    **fields: Any,
) -> tuple[Reply, FakeSession]:
    session = FakeSession(said(*texts, finish=finish))
    return post(create_app(session, config=config or GatewayConfig()), CHAT, ASK | fields), session


def answered(*texts: str, **fields: Any) -> dict[str, Any]:
    reply, _ = asked(*texts, **fields)
    assert reply.status == 200, reply.body
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice


def functions(calls: list[dict[str, Any]]) -> list[dict[str, str]]:
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    return [call["function"] for call in calls]


def test_a_call_is_told_apart_from_what_is_said() -> None:
    choice = answered(f"Let me see.\n<tool_call>\n{OSLO}\n</tool_call>")
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["role"], message["content"]) == ("assistant", "Let me see.")
    (function,) = functions(message["tool_calls"])
    assert function["name"] == "weather"
    assert json.loads(function["arguments"]) == {"city": "Oslo"}


def test_an_answer_without_a_call_is_an_ordinary_one() -> None:
    choice = answered("It is warm.")
    assert choice["message"] == {"role": "assistant", "content": "It is warm.", "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_a_call_that_the_limit_cuts_says_so() -> None:
    choice = answered('<tool_call>{"name": "weather", "argum', finish=FinishReason.LENGTH)
    assert choice["finish_reason"] == "length"


def test_tools_that_may_not_be_called_stay_out_of_prompt_and_answer() -> None:
    reply, session = asked(f"<tool_call>{OSLO}</tool_call>", tool_choice="none")
    assert reply.json()["choices"][0]["message"]["content"] == f"<tool_call>{OSLO}</tool_call>"
    assert b"tools" not in bytes(session.calls[0].prompt)
    _, session = asked("so")
    assert bytes(session.calls[0].prompt).startswith(b"tools tools ")


def test_a_stream_says_the_same_in_deltas() -> None:
    pieces = ["Hm.", "\n<tool", '_call>{"name": "wea', 'ther", "arguments": {"ci', 'ty": "Oslo"}}']
    reply, _ = asked(*pieces, "</tool_call>", f"<tool_call>{OSLO}</tool_call>", stream=True)
    choices = [event["choices"][0] for event in reply.events()]
    content = "".join(choice["delta"].get("content") or "" for choice in choices)
    calls: list[dict[str, Any]] = []
    for choice in choices:
        for call in choice["delta"].get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append(call)
            else:
                assert set(call) == {"index", "function"}
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    assert content == "Hm."
    assert [json.loads(f["arguments"]) for f in functions(calls)] == [{"city": "Oslo"}] * 2
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert len([1 for choice in choices if "tool_calls" in choice["delta"]]) > 2, "as they come"


def test_the_style_is_the_configuration_s() -> None:
    config = GatewayConfig(tool_call_parser="llama3_json")
    choice = answered(OSLO, config=config)
    assert functions(choice["message"]["tool_calls"])[0]["name"] == "weather"
    assert choice["message"]["content"] is None


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        (
            {"tool_choice": "required"},
            [f"[{OSLO}]", f'[{OSLO}, {{"name": "time", "arguments": {{}}}}]'],
            ["[]", "{}", '[{"name": "weather", "arguments": {"city": "Bonn"}}]', '[{"name": "x"}]'],
        ),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            [f"[{OSLO}]"],
            [f"[{OSLO}, {OSLO}]"],
        ),
        ({"tool_choice": NAMED}, [f"[{OSLO}]"], ['[{"name": "time", "arguments": {}}]']),
    ],
)
def test_a_required_call_constrains_the_answer(
    fields: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    reply, session = asked(good[0], **fields)
    named = isinstance(fields["tool_choice"], dict)
    choice = reply.json()["choices"][0]
    assert functions(choice["message"]["tool_calls"])[0]["name"] == "weather"
    assert choice["finish_reason"] == ("stop" if named else "tool_calls")
    constraint = session.calls[0].sampling.constraint
    assert constraint is not None
    schema = json.loads(constraint.text)
    for text in good:
        jsonschema.validate(json.loads(text), schema)
    for text in bad:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TIME, TIME]}, "tools.1.function.name"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "x", "function": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": 4}}]},
            "tools.0.function.parameters",
        ),
        ({"tools": [TIME] * 129}, "tools"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": 4}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice.function.name",
        ),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"tool_choice": "required", "guided_regex": "a+"}, "guided_regex"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "messages.0.tool_calls.0.function",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                    }
                ]
            },
            "messages.0.tool_calls.0.function.arguments",
        ),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str) -> None:
    reply, session = asked("so", **fields)
    assert reply.status == 400
    assert reply.error()["param"] == param
    assert not session.calls


def test_only_allowed_tools_are_offered() -> None:
    mode = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
    _, session = asked("so", tool_choice=mode)
    assert bytes(session.calls[0].prompt).count(b"tools ") == 1
