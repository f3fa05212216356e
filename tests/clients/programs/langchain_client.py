"""LangChain's chat model: a loop with a tool, a stream, a structured answer, the responses API."""

import json
import sys
from typing import Any

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]


class Place(BaseModel):
    city: str


@tool
def add(a: int, b: int) -> int:
    """The sum."""
    return a + b


def chat(**more: Any) -> Any:
    return ChatOpenAI(base_url=URL, api_key="none", model=MODEL, max_retries=0, **more)


def looped(model: Any) -> str:
    """What it says once it has the results of the calls it asked for."""
    messages: list[Any] = [HumanMessage("1 + 2?")]
    with_tools = model.bind_tools([add])
    for _ in range(3):
        answer = with_tools.invoke(messages)
        messages.append(answer)
        if not answer.tool_calls:
            return str(answer.text)
        messages += [add.invoke(call) for call in answer.tool_calls]
    return "it never stopped"


typed = chat().with_structured_output(Place, method="json_schema")
print(
    json.dumps(
        {
            "looped": looped(chat()),
            "streamed": "".join(str(part.text) for part in chat(stream_usage=True).stream("hi")),
            "structured": typed.invoke("where?").city,
            "response": looped(chat(use_responses_api=True)),
        }
    )
)
