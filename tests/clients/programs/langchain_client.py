"""LangChain's chat model: a loop with a tool, a stream, a structured answer, the responses API."""

import json
import sys
from typing import Any, Literal

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]


class Place(BaseModel):
    city: Literal["Paris"]


@tool
def add(a: Literal[1], b: Literal[2]) -> int:
    """The sum."""
    return a + b


def chat(max_tokens: int, **more: Any) -> Any:
    return ChatOpenAI(
        base_url=URL,
        api_key="none",
        model=MODEL,
        max_retries=0,
        temperature=0,
        max_tokens=max_tokens,
        **more,
    )


def looped(**more: Any) -> list[Any]:
    """What the tool was called with and gave, and whether the model then said something."""
    messages: list[Any] = [HumanMessage("1 + 2?")]
    asks = chat(100, **more).bind_tools([add], tool_choice="required", parallel_tool_calls=False)
    answer = asks.invoke(messages)
    results = [add.invoke(call) for call in answer.tool_calls]
    last = chat(12, **more).bind_tools([add], tool_choice="none")
    text = last.invoke([*messages, answer, *results]).text
    return [[call["args"] for call in answer.tool_calls], results[0].content, bool(text)]


typed = chat(100).with_structured_output(Place, method="json_schema")
parts = list(chat(12, stream_usage=True).stream("hi"))
print(
    json.dumps(
        {
            "looped": looped(),
            "looped by responses": looped(use_responses_api=True),
            "streamed": "".join(str(part.text) for part in parts),
            "counted": sum((part.usage_metadata or {}).get("output_tokens", 0) for part in parts)
            > 0,
            "structured": typed.invoke("where?").city,
            "response": str(chat(12, use_responses_api=True).invoke("hi").text),
        }
    )
)
