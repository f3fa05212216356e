"""Three chats at once, streamed with OpenAI's client. PDSERVE_URL says where the gateway is."""

import asyncio
import os

import openai

QUESTIONS = ("What is a lighthouse?", "What is a tide?", "What is a harbour?")


async def answer(client: openai.AsyncOpenAI, model: str, question: str) -> str:
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=24,
        temperature=0,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    return "".join(pieces)


async def main() -> None:
    url = os.environ.get("PDSERVE_URL", "http://127.0.0.1:8000")
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-") as client:
        model = (await client.models.list()).data[0].id
        answers = await asyncio.gather(*(answer(client, model, each) for each in QUESTIONS))
    for question, text in zip(QUESTIONS, answers, strict=True):
        print(f"{question}\n  {text!r}")


if __name__ == "__main__":
    asyncio.run(main())
