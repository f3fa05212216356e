"""OpenAI's library: whole, async, streamed and cancelled, tools, a parsed schema, responses.

What a schema must match leaves one answer, so the answer is known whatever the model.
"""

import asyncio
import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]
ASKED = [{"role": "user", "content": "hi"}]
SHORT = {"model": MODEL, "messages": ASKED, "max_tokens": 12, "temperature": 0}
LONGER = SHORT | {"max_tokens": 100}
RESPONSE = {"model": MODEL, "input": "hi", "max_output_tokens": 12, "temperature": 0}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"a": {"const": 1}, "b": {"const": 2}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


class Place(BaseModel):
    city: Literal["Paris"]


async def asked_async() -> str | None:
    async with openai.AsyncOpenAI(base_url=URL, api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(**SHORT)
        return answer.choices[0].message.content


def called(stream: bool) -> object:
    """The arguments of the one call that the model is made to ask for."""
    tools = {"tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False}
    if stream:
        with client.chat.completions.stream(**LONGER, **tools) as parts:
            answer = parts.get_final_completion()
    else:
        answer = client.chat.completions.create(**LONGER, **tools)
    return json.loads(answer.choices[0].message.tool_calls[0].function.arguments)


def resumed() -> str:
    """A response in the background, left in the middle of its stream and taken up again there."""
    text = identity = ""
    with client.responses.create(**RESPONSE, background=True, stream=True) as events:
        for event in events:
            after = event.sequence_number
            if event.type == "response.created":
                identity = event.response.id
            if event.type == "response.output_text.delta":
                text += event.delta
                break
    for event in client.responses.retrieve(identity, stream=True, starting_after=after):
        if event.type == "response.output_text.delta":
            text += event.delta
        elif event.type == "response.completed":
            stored = event.response.output_text
    assert client.responses.retrieve(identity).output_text == stored == text
    client.responses.delete(identity)
    return text


client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
whole = client.chat.completions.create(**SHORT)
with client.chat.completions.stream(**SHORT) as stream:
    streamed = stream.get_final_completion().choices[0].message.content
with client.chat.completions.create(**SHORT, stream=True) as stream:
    first = next(chunk for chunk in stream if chunk.choices[0].delta.content)
parsed = client.chat.completions.parse(**LONGER, response_format=Place)
response = client.responses.create(**RESPONSE)
try:
    client.chat.completions.create(**SHORT | {"max_tokens": -1})
    refused = None
except openai.BadRequestError as error:
    refused = error.param
print(
    json.dumps(
        {
            "served": MODEL in [model.id for model in client.models.list()],
            "whole": whole.choices[0].message.content,
            "async": asyncio.run(asked_async()),
            "streamed": streamed,
            "cancelled": streamed.startswith(first.choices[0].delta.content),
            "calls": [called(stream=False), called(stream=True)],
            "parsed": parsed.choices[0].message.parsed.city,
            "response": response.output_text,
            "resumed": resumed(),
            "refused": refused,
        }
    )
)
