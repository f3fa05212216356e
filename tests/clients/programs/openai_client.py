"""OpenAI's library: whole, async, streamed and cancelled, tools, a parsed schema, responses,
decisions, files and batches.

What a schema must match leaves one answer, so the answer is known whatever the model.
"""

import asyncio
import json
import sys
import time
from typing import Literal

import openai
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]
BATCH_S_MAX = 600
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


QUESTIONS = [
    {"type": "predicate", "instructions": "Is it a greeting?"},
    {
        "type": "choice",
        "instructions": "Is it rude?",
        "choices": [{"value": True}, {"value": False, "description": "It is not."}],
    },
    {
        "type": "score",
        "instructions": "How warm is it?",
        "levels": [{"label": "cold"}, {"label": "warm"}, {"label": "hot"}],
    },
]


def shared(answers: list[object]) -> bool:
    """Whether the probabilities of each answer that has several sum to 1."""
    several = [getattr(answer, "probabilities", None) for answer in answers]
    sums = [sum(each.probability for each in shares) for shares in several if shares]
    return len(sums) == 2 and all(abs(each - 1) < 1e-6 for each in sums)


def batched() -> tuple[list[list[str]], list[list[str]]]:
    """What the files of answers and errors hold, of a batch with two good lines and a bad one."""
    bodies = {"a": SHORT, "b": SHORT, "c": SHORT | {"max_tokens": -1}}
    url = "/v1/chat/completions"
    lines = [
        json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body})
        for name, body in bodies.items()
    ]
    file = client.files.create(file=("a.jsonl", "\n".join(lines).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h")
    until_s = time.monotonic() + BATCH_S_MAX
    while batch.status in ("validating", "in_progress", "finalizing"):
        assert time.monotonic() < until_s, batch
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed", batch
    assert batch.id in [each.id for each in client.batches.list()]
    good, bad = (
        [json.loads(line) for line in client.files.content(name).text.splitlines()]
        for name in (batch.output_file_id, batch.error_file_id)
    )
    assert client.files.delete(file.id).deleted
    said = [
        [each["custom_id"], each["response"]["body"]["choices"][0]["message"]["content"]]
        for each in good
    ]
    failed = [[each["custom_id"], each["response"]["body"]["error"]["param"]] for each in bad]
    return said, failed


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
decided = client.decisions.create(model=MODEL, input="hi", questions=QUESTIONS)
answered, failed = batched()
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
            "decided": [answer.type for answer in decided.answers],
            "shared": shared(decided.answers),
            "batched": answered,
            "failed": failed,
        }
    )
)
