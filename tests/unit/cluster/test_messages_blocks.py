"""A body of the Messages API becomes the chat that means the same, or is refused by the names that
were sent."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.cluster.gateway.prompts import checked_messages
from pdserve.cluster.http.messages.asking import CountBody, MessageBody, chat_body, check_thinking
from pdserve.cluster.http.messages.blocks import FAILED, turns_of
from pdserve.cluster.http.schemas import ChatBody, checked
from pdserve.cluster.http.tools import tools_of
from pdserve.errors import ConflictingFields, InvalidField, UnusableValue

HI = [{"role": "user", "content": "hi"}]
TOOL = {"name": "add", "description": "adds", "input_schema": {"type": "object"}}


def text(said: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **more}


def use(identity: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": identity, "name": "add", "input": arguments}


def result(identity: str, content: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": identity, "content": content, **more}


def chat(**fields: Any) -> dict[str, Any]:
    tree = {"messages": HI, "max_tokens": 5, **fields}
    return chat_body(checked(MessageBody, tree), tree)


# ── turns ────────────────────────────────────────────────────────────────────────────────────────


def test_a_round_trip_with_tools_keeps_its_order() -> None:
    turns = turns_of(
        [
            {"role": "user", "content": [text("1 + 2?"), text("and 3 + 4?")]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "two sums", "signature": "x"},
                    {"type": "redacted_thinking", "data": "?"},
                    text("I add."),
                    use("t1", a=1, b=2),
                    use("t2", a=3, b=4),
                ],
            },
            {
                "role": "user",
                "content": [result("t1", "3"), result("t2", [text("7")]), text("so?")],
            },
        ],
        [text("be brief", cache_control={"type": "ephemeral"}), text("be exact")],
    )
    calls = [
        {"id": f"t{n}", "type": "function", "function": {"name": "add", "arguments": arguments}}
        for n, arguments in ((1, {"a": 1, "b": 2}), (2, {"a": 3, "b": 4}))
    ]
    assert turns == [
        {"role": "system", "content": "be brief\nbe exact"},
        {"role": "user", "content": "1 + 2?\nand 3 + 4?"},
        {
            "role": "assistant",
            "content": "I add.",
            "reasoning_content": "two sums",
            "tool_calls": calls,
        },
        {"role": "tool", "tool_call_id": "t1", "content": "3"},
        {"role": "tool", "tool_call_id": "t2", "content": "7"},
        {"role": "user", "content": "so?"},
    ]


def test_neighbours_of_one_role_are_one_turn() -> None:
    turns = turns_of(
        [
            {"role": "user", "content": "a"},
            {"role": "user", "content": [text("b")]},
            {"role": "assistant", "content": [text("c"), use("t1")]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "d"}, use("t2")]},
            {"role": "user", "content": [result("t1"), result("t2")]},
        ],
        "",
    )
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "tool"]
    assert turns[0]["content"] == "a\nb"
    assert turns[1]["content"] == "c"
    assert turns[1]["reasoning_content"] == "d"
    assert [call["id"] for call in turns[1]["tool_calls"]] == ["t1", "t2"]


def test_a_tool_that_failed_says_so() -> None:
    (turn,) = turns_of([{"role": "user", "content": [result("t", "no network", is_error=True)]}])
    assert turn["content"] == f"{FAILED}no network"


TEXTS = st.text(max_size=5)
BLOCKS = st.one_of(
    TEXTS.map(text),
    st.builds(result, st.sampled_from(["t1", "t2"]), st.none() | TEXTS),
)
ANSWERS = st.one_of(
    TEXTS.map(text),
    TEXTS.map(lambda said: {"type": "thinking", "thinking": said, "signature": ""}),
    st.builds(use, st.sampled_from(["t1", "t2"]), a=st.integers()),
)
MESSAGES = st.one_of(
    st.fixed_dictionaries({"role": st.just("user"), "content": TEXTS | st.lists(BLOCKS)}),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXTS | st.lists(ANSWERS)}),
    st.fixed_dictionaries({"role": st.just("system"), "content": TEXTS}),
)


@given(st.lists(MESSAGES, min_size=1, max_size=6))
def test_whatever_was_said_is_in_the_chat_once(messages: list[dict[str, Any]]) -> None:
    turns = turns_of(messages)
    checked_messages(turns)  # the chat takes them
    blocks = [
        block
        for message in messages
        for block in (
            [text(message["content"])]
            if isinstance(message["content"], str)
            else message["content"]
        )
    ]
    kinds = {
        "text": "\n".join(t["content"] for t in turns if t["role"] != "tool" and t["content"]),
        "thinking": "\n".join(filter(None, (t.get("reasoning_content") for t in turns))),
    }
    for kind, found in kinds.items():
        assert found == "\n".join(b[kind] for b in blocks if b["type"] == kind and b[kind])
    results = [(t["tool_call_id"], t["content"]) for t in turns if t["role"] == "tool"]
    assert results == [
        (b["tool_use_id"], b["content"] or "") for b in blocks if b["type"] == "tool_result"
    ]
    calls = [call for turn in turns for call in turn.get("tool_calls", ())]
    assert [(call["id"], call["function"]["arguments"]) for call in calls] == [
        (b["id"], b["input"]) for b in blocks if b["type"] == "tool_use"
    ]
    for before, after in itertools.pairwise(turns):
        assert before["role"] != after["role"] or before["role"] == "tool"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("hi", "messages.0"),
        ({"content": "hi"}, "messages.0.role"),
        ({"role": "tool", "content": "hi"}, "messages.0.role"),
        ({"role": "user"}, "messages.0.content"),
        ({"role": "user", "content": 5}, "messages.0.content"),
        ({"role": "user", "content": ["hi"]}, "messages.0.content.0"),
        ({"role": "user", "content": [{}]}, "messages.0.content.0.type"),
        ({"role": "user", "content": [{"type": ["text"]}]}, "messages.0.content.0.type"),
        ({"role": "user", "content": [{"type": "image"}]}, "messages.0.content.0.type"),
        ({"role": "user", "content": [{"type": "document"}]}, "messages.0.content.0.type"),
        ({"role": "user", "content": [use("t")]}, "messages.0.content.0.type"),
        ({"role": "user", "content": [text("a"), {"type": "text"}]}, "messages.0.content.1.text"),
        (
            {"role": "user", "content": [{"type": "tool_result"}]},
            "messages.0.content.0.tool_use_id",
        ),
        ({"role": "user", "content": [result("t", 5)]}, "messages.0.content.0.content"),
        (
            {"role": "user", "content": [result("t", [{"type": "image"}])]},
            "messages.0.content.0.content.0.type",
        ),
        (
            {"role": "user", "content": [result("t", is_error="yes")]},
            "messages.0.content.0.is_error",
        ),
        ({"role": "assistant", "content": [result("t")]}, "messages.0.content.0.type"),
        (
            {"role": "assistant", "content": [{"type": "thinking"}]},
            "messages.0.content.0.thinking",
        ),
        (
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f"}]},
            "messages.0.content.0.input",
        ),
        ({"role": "system", "content": [use("t")]}, "messages.0.content.0.type"),
    ],
)
def test_what_is_wrong_in_a_message_is_named(message: Any, field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        turns_of([message])
    assert caught.value.field == field


# ── fields ───────────────────────────────────────────────────────────────────────────────────────


def test_fields_have_their_place_in_the_chat() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert chat(
        model="m",
        system="brief",
        stop_sequences=["x"],
        temperature=0.5,
        top_k=5,
        min_p=0.1,
        metadata={"user_id": "ann"},
        service_tier="standard_only",
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": schema}},
        thinking={"type": "disabled"},
        stream=True,
        tools=[TOOL],
        tool_choice={"type": "none"},
        anything="else",
    ) == {
        "model": "m",
        "messages": [{"role": "system", "content": "brief"}, *HI],
        "max_tokens": 5,
        "stop": ["x"],
        "temperature": 0.5,
        "top_k": 5,
        "min_p": 0.1,
        "user": "ann",
        "service_tier": "standard",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema},
        },
        "chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low"},
        "stream": True,
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "add",
                    "description": "adds",
                    "parameters": {"type": "object"},
                },
            }
        ],
        "tool_choice": "none",
    }


@pytest.mark.parametrize(
    ("said", "required", "named", "parallel"),
    [
        ({"type": "auto"}, False, False, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, False, False, False),
        ({"type": "any"}, True, False, True),
        ({"type": "any", "disable_parallel_tool_use": False}, True, False, True),
        ({"type": "any", "disable_parallel_tool_use": True}, True, False, False),
        ({"type": "tool", "name": "add"}, True, True, True),
        (None, False, False, True),
    ],
)
def test_a_tool_choice_is_the_chats(said: Any, required: bool, named: bool, parallel: bool) -> None:
    body = checked(ChatBody, chat(tools=[TOOL], tool_choice=said))
    tools = tools_of(body.tools, body.tool_choice, body.parallel_tool_calls)
    assert tools is not None
    assert (tools.required, tools.named, tools.parallel) == (required, named, parallel)


def test_speed_is_a_tier_where_none_is_said() -> None:
    assert chat(speed="fast")["service_tier"] == "fast"
    assert chat(speed="fast", service_tier="flex")["service_tier"] == "flex"
    assert "service_tier" not in chat(speed=None)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": [{**TOOL, "type": "web_search_20250305"}]}, "tools.0.type"),
        ({"tools": [TOOL, {"name": "f"}]}, "tools.1.input_schema"),
        ({"tool_choice": {"type": "required"}}, "tool_choice.type"),
        (
            {"tool_choice": {"type": "any", "disable_parallel_tool_use": 1}},
            "tool_choice.disable_parallel_tool_use",
        ),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "json"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"metadata": {"user_id": 5}}, "metadata.user_id"),
        ({"service_tier": "best"}, "service_tier"),
        ({"speed": "slow"}, "speed"),
        ({"system": [{"type": "image"}]}, "system.0.type"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"inference_geo": "us"}, "inference_geo"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"stop_sequences": "x"}, "stop_sequences"),
    ],
)
def test_what_is_wrong_in_a_field_is_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        chat(**fields)
    assert caught.value.field == field


# ── thinking ─────────────────────────────────────────────────────────────────────────────────────

ENABLED = {"type": "enabled", "budget_tokens": 1024}


@pytest.mark.parametrize(
    ("fields", "thinks", "field", "kind"),
    [
        ({"thinking": {"type": "always"}}, True, "thinking.type", InvalidField),
        ({"thinking": {"type": "enabled"}}, True, "thinking.budget_tokens", InvalidField),
        (
            {"thinking": {"type": "enabled", "budget_tokens": True}},
            True,
            "thinking.budget_tokens",
            InvalidField,
        ),
        (
            {"thinking": {"type": "adaptive", "display": "all"}},
            True,
            "thinking.display",
            InvalidField,
        ),
        (
            {"thinking": ENABLED, "max_tokens": 1024},
            True,
            "thinking.budget_tokens",
            ConflictingFields,
        ),
        ({"thinking": ENABLED}, False, "thinking.type", UnusableValue),
        (
            {"thinking": ENABLED, "tools": [TOOL], "tool_choice": {"type": "any"}},
            True,
            "thinking.type",
            ConflictingFields,
        ),
        (
            {"thinking": ENABLED, "output_config": {"format": {"type": "json_schema"}}},
            True,
            "thinking.type",
            ConflictingFields,
        ),
    ],
)
def test_thinking_that_cannot_be_is_refused(
    fields: dict[str, Any], thinks: bool, field: str, kind: type[InvalidField]
) -> None:
    body = checked(MessageBody, {"messages": HI, "max_tokens": 4000, **fields})
    with pytest.raises(InvalidField) as caught:
        check_thinking(body, thinks=thinks)
    assert (caught.value.field, type(caught.value)) == (field, kind)


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize(
    "thinking",
    [
        None,
        {"type": "disabled"},
        {"type": "adaptive"},
        {"type": "adaptive", "display": "omitted"},
        {"type": "adaptive", "display": None},
    ],
)
def test_thinking_may_be_left_to_the_model(thinking: Any, thinks: bool) -> None:
    body = checked(CountBody, {"messages": HI, "thinking": thinking})
    check_thinking(body, thinks=thinks)


def test_thinking_is_told_to_the_template() -> None:
    said = chat(max_tokens=4000, thinking=ENABLED, output_config={"effort": "max"})
    assert said["chat_template_kwargs"] == {"enable_thinking": True, "reasoning_effort": "max"}
    said = chat(thinking={"type": "disabled"}, chat_template_kwargs={"enable_thinking": True})
    assert said["chat_template_kwargs"] == {"enable_thinking": True}
    assert "chat_template_kwargs" not in chat(thinking={"type": "adaptive"})
