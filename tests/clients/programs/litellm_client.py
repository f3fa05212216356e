"""LiteLLM, as its users call a vLLM server: whole, streamed, with tools, too long; responses."""

import json
import sys

import litellm

URL, MODEL = sys.argv[1:]
HERE = {"api_base": URL, "api_key": "none", "num_retries": 0}
ASKED = [{"role": "user", "content": "hi"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        },
    },
}


def refused() -> bool:
    """Whether a prompt that is too long is told apart, which its fallbacks need."""
    too_long = [{"role": "user", "content": "x " * 5000}]
    try:
        litellm.completion(model=f"hosted_vllm/{MODEL}", messages=too_long, **HERE)
    except litellm.ContextWindowExceededError:
        return True
    return False


whole = litellm.completion(model=f"hosted_vllm/{MODEL}", messages=ASKED, **HERE)
parts = litellm.completion(
    model=f"hosted_vllm/{MODEL}",
    messages=ASKED,
    stream=True,
    stream_options={"include_usage": True},
    **HERE,
)
chunks = list(parts)
called = litellm.completion(model=f"hosted_vllm/{MODEL}", messages=ASKED, tools=[ADD], **HERE)
response = litellm.responses(model=f"openai/{MODEL}", input="hi", **HERE)
print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "cached": whole.usage.prompt_tokens_details.cached_tokens,
            "streamed": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
            "call": json.loads(called.choices[0].message.tool_calls[0].function.arguments),
            "too_long": refused(),
            "response": response.output[0].content[0].text,
        }
    )
)
