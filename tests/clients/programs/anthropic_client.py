"""Anthropic's library: models, and messages whole, async, streamed and cancelled, a loop with
tools, a parsed schema, counted tokens, and its classes of errors.

What a schema must match leaves one answer, so the answer is known whatever the model.
"""

import asyncio
import json
import sys
from typing import Literal

import anthropic
from pydantic import BaseModel

URL, MODEL = sys.argv[1].removesuffix("/v1"), sys.argv[2]
ASKED = [{"role": "user", "content": "hi"}]
GREEDY = {"extra_body": {"temperature": 0}}  # the library has no parameter for it any more
SHORT = {"model": MODEL, "messages": ASKED, "max_tokens": 12, **GREEDY}
LONGER = SHORT | {"max_tokens": 100}
ADD = {
    "name": "add",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"const": 1}, "b": {"const": 2}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
MUST_CALL = {"tools": [ADD], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}


class Place(BaseModel):
    city: Literal["Paris"]


async def asked_async() -> str:
    """Whole, and streamed the same."""
    async with anthropic.AsyncAnthropic(base_url=URL, api_key="none", max_retries=0) as client:
        whole = await client.messages.create(**SHORT)
        async with client.messages.stream(**SHORT) as stream:
            text = "".join([part async for part in stream.text_stream])
        assert text == whole.content[0].text
        return text


def called(stream: bool) -> object:
    """What the one call says that the model is made to ask for, and that the result is taken."""
    if stream:
        with client.messages.stream(**LONGER, **MUST_CALL) as parts:
            answer = parts.get_final_message()
    else:
        answer = client.messages.create(**LONGER, **MUST_CALL)
    assert answer.stop_reason == "tool_use"
    (use,) = answer.content
    result = {"type": "tool_result", "tool_use_id": use.id, "content": str(sum(use.input.values()))}
    messages = [*ASKED, answer.to_param(), {"role": "user", "content": [result]}]
    after = client.messages.create(**SHORT | {"messages": messages}, tools=[ADD])
    assert after.role == "assistant"
    return use.input


def refused(**fields: object) -> str:
    """The class of the error, and its code."""
    try:
        client.messages.create(**SHORT | fields)
    except anthropic.APIStatusError as error:
        named = error.request_id == error.body["request_id"]
        return f"{type(error).__name__} {error.error_code}" if named else "another request's"
    return "nothing"


client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
whole = client.messages.create(**SHORT, system=[{"type": "text", "text": ""}])
counted = client.messages.count_tokens(model=MODEL, messages=ASKED)
used = whole.usage
with client.messages.stream(**SHORT) as stream:
    events = [event.type for event in stream]
    streamed = stream.get_final_message()
assert [events[0], events[-1]] == ["message_start", "message_stop"]
assert streamed.usage.output_tokens == used.output_tokens
with client.messages.create(**SHORT, stream=True) as stream:
    first = next(event for event in stream if event.type == "content_block_delta")
listed = {each.id: each for each in client.models.list()}
about = client.models.retrieve(MODEL)
assert about.created_at == listed[MODEL].created_at
parsed = client.messages.parse(**LONGER, output_format=Place)
print(
    json.dumps(
        {
            "whole": whole.content[0].text,
            "async": asyncio.run(asked_async()),
            "streamed": streamed.content[0].text,
            "cancelled": streamed.content[0].text.startswith(first.delta.text),
            "counted": counted.input_tokens == used.input_tokens + used.cache_read_input_tokens,
            "listed": [about.type, about.display_name == MODEL],
            "calls": [called(stream=False), called(stream=True)],
            "parsed": parsed.parsed_output.city,
            "refused": refused(max_tokens=-1),
            "unknown": refused(model="none of ours"),
        }
    )
)
