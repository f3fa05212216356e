"""Items of the responses API become the messages of a chat, and an answer's items go back in."""

from typing import Any

import pytest

from pdserve.cluster.http.responses.items import items_of, messages_of
from pdserve.errors import InvalidField


def messages(*items: Any) -> list[dict[str, Any]]:
    return messages_of(items_of(list(items)))


def test_text_is_a_message_of_the_user() -> None:
    assert messages_of(items_of("hi")) == [{"role": "user", "content": "hi"}]


def test_the_answers_items_are_one_message_again() -> None:
    """So that a template sees what the model wrote: thought, text, calls; then their results."""
    assert messages(
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm"}],
        },
        {"role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "c"},
        {
            "type": "function_call_output",
            "call_id": "2",
            "output": [{"type": "input_text", "text": "d"}],
        },
    ) == [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "b",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "c"},
        {"role": "tool", "tool_call_id": "2", "content": "d"},
    ]


def test_two_answers_in_a_row_are_two_messages() -> None:
    two = messages({"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"})
    assert [message["content"] for message in two] == ["a", "b"]


def test_every_item_has_an_id_and_keeps_its_own() -> None:
    first, second = items_of([{"role": "user", "content": "a", "id": "mine"}, *items_of("b")])
    assert first["id"] == "mine"
    assert second["id"].startswith("msg_")


@pytest.mark.parametrize(
    ("said", "field"),
    [
        (None, "input"),
        (5, "input"),
        ([], "input"),
        ([5], "input.0"),
        ([{"type": "item_reference", "id": "x"}], "input.0.type"),
        ([{"type": ["message"]}], "input.0.type"),
        ([{"role": "tool", "content": "x"}], "input.0.role"),
        ([{"role": ["user"], "content": "x"}], "input.0.role"),
        ([{"role": "user"}], "input.0.content"),
        ([{"role": "user", "content": [{"type": "input_image"}]}], "input.0.content.0"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input.0.content.0.text"),
        ([{"role": "user", "content": "x", "id": 5}], "input.0.id"),
        ([{"type": "function_call", "call_id": "1", "name": "f"}], "input.0.arguments"),
        ([{"type": "function_call_output", "output": "x"}], "input.0.call_id"),
        ([{"type": "function_call_output", "call_id": "1"}], "input.0.output"),
        ([{"type": "reasoning", "content": "x"}], "input.0.content"),
        ([{"type": "reasoning", "content": [{}]}], "input.0.content.0.text"),
    ],
)
def test_a_bad_item_is_named(said: Any, field: str) -> None:
    with pytest.raises(InvalidField) as error:
        items_of(said)
    assert error.value.field == field
