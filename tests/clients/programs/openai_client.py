"""OpenAI's library: whole, async, streamed and cancelled, tools, a parsed schema, responses."""

import asyncio
import json
import sys

import openai
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]
ASKED = [{"role": "user", "content": "hi"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


class Place(BaseModel):
    city: str


async def asked_async() -> str | None:
    async with openai.AsyncOpenAI(base_url=URL, api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=ASKED)
        return answer.choices[0].message.content


client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
whole = client.chat.completions.create(model=MODEL, messages=ASKED)
with client.chat.completions.stream(model=MODEL, messages=ASKED) as stream:
    streamed = stream.get_final_completion().choices[0].message.content
with client.chat.completions.create(model=MODEL, messages=ASKED, stream=True) as stream:
    first = next(chunk for chunk in stream if chunk.choices[0].delta.content)
called = client.chat.completions.create(model=MODEL, messages=ASKED, tools=[ADD])
parsed = client.chat.completions.parse(model=MODEL, messages=ASKED, response_format=Place)
response = client.responses.create(model=MODEL, input="hi")
try:
    client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=-1)
    refused = None
except openai.BadRequestError as error:
    refused = error.param
print(
    json.dumps(
        {
            "models": [model.id for model in client.models.list()],
            "whole": whole.choices[0].message.content,
            "async": asyncio.run(asked_async()),
            "streamed": streamed,
            "cancelled_after": first.choices[0].delta.content,
            "call": json.loads(called.choices[0].message.tool_calls[0].function.arguments),
            "parsed": parsed.choices[0].message.parsed.city,
            "response": response.output_text,
            "refused": refused,
        }
    )
)
