"""LiteLLM, as its users call a vLLM server: whole, streamed, with tools, too long; responses;
documents in order, decisions."""

import json
import sys

import litellm

URL, MODEL = sys.argv[1:]
HERE = {"api_base": URL, "api_key": "none", "num_retries": 0, "temperature": 0}
SHORT = HERE | {"max_tokens": 12}
ASKED = [{"role": "user", "content": "hi"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"const": 1}, "b": {"const": 2}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


def refused() -> bool:
    """Whether a prompt that is too long is told apart, which its fallbacks need."""
    too_long = [{"role": "user", "content": "x " * 20_000}]
    try:
        litellm.completion(model=f"hosted_vllm/{MODEL}", messages=too_long, **HERE)
    except litellm.ContextWindowExceededError:
        return True
    return False


whole = litellm.completion(model=f"hosted_vllm/{MODEL}", messages=ASKED, **SHORT)
parts = litellm.completion(
    model=f"hosted_vllm/{MODEL}",
    messages=ASKED,
    stream=True,
    stream_options={"include_usage": True},
    **SHORT,
)
chunks = list(parts)
called = litellm.completion(
    model=f"hosted_vllm/{MODEL}",
    messages=ASKED,
    tools=[ADD],
    tool_choice="required",
    parallel_tool_calls=False,
    max_tokens=100,
    **HERE,
)
response = litellm.responses(model=f"openai/{MODEL}", input="hi", max_output_tokens=12, **HERE)
ranked = litellm.rerank(
    model=f"hosted_vllm/{MODEL}",
    query="hi",
    documents=["hi", {"text": "ho"}, "hm"],
    top_n=2,
    api_base=URL,
    api_key="none",
)
decided = litellm.decisions(
    model=f"openai/{MODEL}",
    input="hi",
    questions=[
        {"type": "predicate", "instructions": "Is it a greeting?", "name": "greets"},
        {
            "type": "choice",
            "instructions": "Which language?",
            "choices": [{"value": "English"}, {"value": "French"}],
        },
    ],
    api_base=URL,
    api_key="none",
)
shares = [each.probability for each in decided.answers[1].probabilities]
print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "counted": whole.usage.total_tokens == chunks[-1].usage.total_tokens > 0,
            "streamed": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
            "call": json.loads(called.choices[0].message.tool_calls[0].function.arguments),
            "too_long": refused(),
            "response": response.output[0].content[0].text,
            "ranked": [len(ranked.results), ranked.results[0]["document"] is not None],
            "decided": [each.type for each in decided.answers],
            "shared": abs(sum(shares) - 1) < 1e-6,
        }
    )
)
