"""Pydantic AI: agents with a tool and with a typed answer, over both APIs."""

import json
import sys
from typing import Any

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, MODEL = sys.argv[1:]
PROVIDER = OpenAIProvider(base_url=URL, api_key="none")


class Place(BaseModel):
    city: str


def looped(model: Any) -> str:
    agent = Agent(model)

    @agent.tool_plain
    def add(a: int, b: int) -> int:
        """The sum."""
        return a + b

    return str(agent.run_sync("1 + 2?").output)


chat = OpenAIChatModel(MODEL, provider=PROVIDER)
print(
    json.dumps(
        {
            "looped": looped(chat),
            "typed": Agent(chat, output_type=Place).run_sync("where?").output.city,
            "response": looped(OpenAIResponsesModel(MODEL, provider=PROVIDER)),
        }
    )
)
