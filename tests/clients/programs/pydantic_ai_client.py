"""Pydantic AI: agents with a tool and a typed answer, and a plain one, over both APIs.

An agent that must answer with a type has its models call a tool in every step. Each step offers
one, so which it is does not depend on the model.
"""

import json
import sys
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_ai import Agent, ModelSettings
from pydantic_ai.capabilities import PrepareOutputTools
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, MODEL = sys.argv[1:]
PROVIDER = OpenAIProvider(base_url=URL, api_key="none")


class Place(BaseModel):
    city: Literal["Paris"]


def looped(model: Any) -> list[Any]:
    """What the agent's tool was called with, and its answer."""
    called: list[Any] = []

    async def in_the_first_step(context: Any, tool: Any) -> Any:
        return tool if context.run_step == 1 else None

    async def in_later_steps(context: Any, tools: list[Any]) -> list[Any]:
        return tools if context.run_step > 1 else []

    agent = Agent(
        model,
        output_type=Place,
        capabilities=[PrepareOutputTools(in_later_steps)],
        model_settings=settings(100),
    )

    @agent.tool_plain(prepare=in_the_first_step)
    def add(a: Literal[1], b: Literal[2]) -> int:
        """The sum."""
        called.append({"a": a, "b": b})
        return a + b

    answer = agent.run_sync("1 + 2?").output
    return [called, answer.city]


def settings(max_tokens: int) -> ModelSettings:
    return ModelSettings(temperature=0, max_tokens=max_tokens, parallel_tool_calls=False)


def said(model: Any) -> str:
    return str(Agent(model, model_settings=settings(12)).run_sync("hi").output)


chat = OpenAIChatModel(MODEL, provider=PROVIDER)
responses = OpenAIResponsesModel(MODEL, provider=PROVIDER)
print(
    json.dumps(
        {
            "looped": looped(chat),
            "looped by responses": looped(responses),
            "said": said(chat),
            "response": said(responses),
        }
    )
)
